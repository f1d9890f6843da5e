"""A fitted detector as one file that runs without this library."""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..files import check_writable, write_atomically
from ..ops.dispatch import by_reference
from ..version import __version__
from ._host import require

FORMATS = ("torch", "aoti", "onnx")
# How far the exported program may be from the detector, relative to scores of the size of 1. In
# front of products of bfloat16 a last bit may become one of bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3}
GPU_TOLERANCE = 2e-2
# PyTorch traces and compiles one program at a time.
_turn = threading.RLock()


class ScoringProgram(nn.Module):
    """Raw samples of a detector to its whole answer, in plain PyTorch on the CPU.

    ``forward(x)``: images (N,C,H,W) at the detector's size, float32 in [0,1] or uint8, or vectors
    (N,D) float32. Returns a dict: ``score`` (N,) float32; ``p_value`` (N,) float32; ``label`` (N,)
    int64, where the detector gives labels; ``map`` (N,H,W) float32, for images.
    """

    def __init__(self, detector):
        super().__init__()
        self.maps = detector.config.kind != "vector"
        self.model = copy.deepcopy(detector.model).to("cpu")
        self.model.device = torch.device("cpu")
        self.model.use(
            [s if s is None else type(s)(*(v.cpu() for v in s)) for s in detector.statistics]
        )
        conformal = detector.conformal
        # Exact: these are scores in float32 to begin with.
        scores = torch.from_numpy(conformal.scores.copy()).float()
        self.register_buffer("calibration", scores)
        # What each score adds to the tail.
        self.register_buffer("weight", torch.from_numpy(-np.diff(conformal.tail)).float())
        self.groups = conformal.groups
        self.threshold = conformal.threshold

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.dtype == torch.uint8:
            x = x.float() / 255
        map_, score = self.model.score(x)
        tail = (self.calibration >= score[:, None]).float() @ self.weight
        result = {"score": score, "p_value": (1 + tail) / (self.groups + 1)}
        if self.threshold is not None:
            result["label"] = (~(score <= self.threshold)).long()  # 1 for NaN
        if self.maps:
            result["map"] = map_
        return result


def export(detector, path: str | os.PathLike, format: str = "torch", uint8: bool = False) -> None:
    """Write ``detector`` in its present mode; see :meth:`diffad_fast.Detector.export`."""
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose {', '.join(FORMATS)}")
    if detector.config.kind not in ("image", "vector"):
        raise InputError(
            f"detectors of kind {detector.config.kind!r} are not exported: what decodes, resamples "
            "and cuts recordings into whole windows would be missing in the program; score them "
            "where this library is installed"
        )
    if uint8 and detector.config.kind == "vector":
        raise InputError("uint8 is for images, whose values are 0..255: leave it out for vectors")
    if format == "onnx":
        require("onnxscript")
        # Of the token MLP the program rounds what goes into products, and computes in float32.
        if detector.config.inference_dtype == "bfloat16" and not detector.config.on_tokens:
            raise InputError(
                "ONNX runtimes compute bfloat16 on few devices: fit the U-Net with "
                "inference_dtype='float32' to export ONNX"
            )
    if detector.config.overlap is not None:
        raise InputError(
            "an exported program scores images of image_size: a detector with overlap would need "
            "its windows cut outside, so fit one without"
        )
    path = Path(path)
    if format != "onnx" and path.suffix != ".pt2":
        raise InputError(f"{path} does not end in .pt2, as files of the format {format!r} do")
    check_writable(path)
    with _turn:
        write_atomically(path, _content(detector, format, uint8))


def _content(detector, format: str, uint8: bool) -> bytes:
    example = _example(detector, uint8)
    program = _traced(ScoringProgram(detector).eval().requires_grad_(False), example)
    expected = detector.score_batch(example.float() / 255 if uint8 else example)[1]
    error = abs(program.module()(example)["score"].numpy() - expected).max()
    tolerance = TOLERANCES[detector.config.inference_dtype]
    if detector.device.type != "cpu":  # the detector rounds more, the program is traced for a CPU
        tolerance = GPU_TOLERANCE
    if not error <= tolerance * max(1.0, abs(expected).max()):
        raise RuntimeError(
            f"the exported program's scores differ by {error:.2g} from the detector's: export it "
            "as diffad_fast.load(path, device='cpu') gives it, and report this"
        )
    facts = {"diffad_fast": __version__, "config": detector.config.to_json()}
    with tempfile.TemporaryDirectory() as folder:
        return _WRITERS[format](program, example, facts, folder)


def _example(detector, uint8: bool) -> torch.Tensor:
    """Three samples, which the program is traced with."""
    generator = torch.Generator().manual_seed(0)
    config = detector.config
    if config.kind == "vector":
        tokens = detector.model.representation
        noise = torch.randn(3, *tokens.mean.shape, generator=generator)
        return tokens.mean.cpu() + tokens.deviation.cpu() * noise
    x = torch.randint(256, (3, config.channels, *config.image_size), generator=generator)
    return x.to(torch.uint8) if uint8 else x.float() / 255


def _traced(program: ScoringProgram, example: torch.Tensor) -> torch.export.ExportedProgram:
    with by_reference(), torch.no_grad():
        program(example)  # fills what is computed once and then kept: it becomes constants
        batch = torch.export.Dim("batch", min=1)
        shapes = ({0: batch},)
        try:
            return torch.export.export(program, (example,), dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError as error:  # its text is of guards and symbols
            raise InputError(
                "this denoiser, or these features, cannot be traced for batches of any length: "
                "export a detector whose modules do nothing that depends on how many samples they "
                "are given"
            ) from error


def _torch(program, example, facts, folder) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"diffad_fast.json": json.dumps(facts)})
    return buffer.getvalue()


def _aoti(program, example, facts, folder) -> bytes:
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=os.path.join(folder, "model.pt2"),
        inductor_configs={"aot_inductor.metadata": facts},
    )
    return Path(path).read_bytes()


def _onnx(program, example, facts, folder) -> bytes:
    from onnxscript import optimizer

    names = list(program.module()(example))
    # Their optimizer tries every rule on every node: minutes for a U-Net, for what runtimes do when
    # they load a model. Of it this is enough, in a second.
    converted = torch.onnx.export(
        program, (), dynamo=True, input_names=["x"], output_names=names, optimize=False,
        verbose=False,
    )  # fmt: skip
    optimizer.fold_constants(converted.model)
    optimizer.remove_unused_nodes(converted.model)
    model = converted.model_proto
    # The converter notes for each node which source line it comes from: megabytes, with the paths
    # of this machine.
    for node in model.graph.node:
        node.ClearField("metadata_props")
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


_WRITERS = {"torch": _torch, "aoti": _aoti, "onnx": _onnx}
