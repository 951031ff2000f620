"""sLSTM parallel in time: all tokens of a window at once, as a fixed point.

The gates of a token depend on R y of the token before. Given a guess of every y, R y is one product over time
(`forward.products`), and the cells c, n, m are a scan with known gates, channel by channel:

    summarize   each chunk of L tokens to its effect on the cells before it              (G, NC, NH, DH)
    across      the cells before each chunk from those before the first; long scans go by `group`
    emit        the recurrence within each chunk, which gives every y                    (G, NC, L, NH, DH)

These y are a better guess. The fixed point is the recurrence, for any first guess; after k rounds the first k tokens
are exact. `certificate.movement` measures how far a round moved y, and `certificate.judge` turns two such measurements
into an estimate of the error. `settle` is a last round, which also gives the cells after it. The gradient is the
transposed linear system, solved by the same kind of rounds.

A window is x (G, NC, L, 4, NH, DH), G rows of tokens in chunks; h (G, NC, L, NH, DH). A mask (G, NC, L), uint8, may
mark a token as the first of a document (RESET) or as padding (PAD).
Prior work: DEER and ParaRNN solve nonlinear recurrences by Newton steps; these rounds iterate the exact cells.
"""
