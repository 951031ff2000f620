"""Each example of the documents runs as it stands, in a process that has torch alone, and its figures are right."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "torch_xlstm_ops/docs/examples"
NEEDS = {
    "patch_transformers": "transformers", "compile_backend": "transformers", "export": "transformers",
    "padded_prompts": "transformers", "long_prompt": "transformers", "chat": "transformers", "ray_workers": "ray",
    "forecasting": "tirex", "beam_search": "transformers", "triton_names": "mlstm_kernels triton",
}
NEAR = 1e-3  # for logits in float32


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path, forked, tmp_path):
    for package in NEEDS.get(path.stem, "torch").split():
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    done = forked.run(path, folder=tmp_path, seconds=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for difference in re.findall(r"largest difference.*: (\S+)", done.stdout):
        assert float(difference) < NEAR
    for loss in re.findall(r"step 59: loss (\S+)", done.stdout):
        assert float(loss) < 0.1


def test_there_are_at_least_ten_examples():
    assert len([*FOLDER.glob("*.py")]) >= 10
