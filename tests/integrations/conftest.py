"""Lets PyPI's torchvision, which is linked to CUDA, be imported beside a CPU build of torch."""

import importlib.util

import torch

if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    # It does not register these operators there, and refers to them when imported
    # (pytorch/vision#9085).
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
