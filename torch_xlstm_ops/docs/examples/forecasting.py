"""Forecast with TiRex on our operators; the weights are random, `load_model` loads the published ones."""
import torch
from tirex.models.tirex import TiRexZero

from torch_xlstm_ops.patch import patch

torch.manual_seed(0)
config = {
    "input_patch_size": 32, "output_patch_size": 32, "quantiles": [n / 10 for n in range(1, 10)],
    "block_kwargs": {"num_blocks": 2, "embedding_dim": 64, "num_heads": 2}, "input_ff_dim": 128,
}
model = TiRexZero(backend="torch", model_config=config, train_ctx_len=2048).eval()
for block in model.blocks:
    torch.nn.init.normal_(block.slstm_layer.slstm_cell._bias_)
series = torch.sin(torch.arange(256) / 9)[None]
with torch.no_grad(), patch("tirex-ts") as handle:
    quantiles, mean = model.forecast(context=series, prediction_length=64)
    print(*handle.report(), sep="\n")
print("quantiles", tuple(quantiles.shape), "mean", tuple(mean.shape))
