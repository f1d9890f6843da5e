"""A detector as a program that runs without this library: torch.export, and ONNX if it is there."""

import importlib.util

import numpy as np
import torch

import diffad_fast as daf


def main() -> None:
    rng = np.random.default_rng(0)
    detector = daf.Detector(kind="vector", train_steps=50, token_width=64, device="cpu")
    detector.fit(rng.normal(size=(400, 6)))
    X = rng.normal(size=(3, 6)).astype(np.float32) * [[1], [1], [4]]
    X = X.astype(np.float32)
    print("detector     ", detector.score(X).score)

    detector.export("detector.pt2")
    program = torch.export.load("detector.pt2").module()
    print("torch.export ", program(torch.from_numpy(X))["score"].numpy())

    if all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime")):
        import onnxruntime

        detector.export("detector.onnx", "onnx")
        score, p_value, label = onnxruntime.InferenceSession("detector.onnx").run(None, {"x": X})
        print("ONNX         ", score, "p-values", p_value, "labels", label)

    detector.save_pretrained("detector", data="400 rows of white noise.")
    print("from a folder", daf.Detector.from_pretrained("detector").score(X).score)


if __name__ == "__main__":
    main()
