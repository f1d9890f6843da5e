"""In a scikit-learn pipeline, judged by cross-validation."""

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffad_fast.integrations.sklearn import DiffusionOutlierDetector


def main() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 600)
    normal = 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * rng.normal(size=(600, 2))
    odd = rng.uniform(-5, 5, size=(30, 2))  # anywhere
    X, y = np.concatenate([normal, odd]), np.repeat([1, -1], [600, 30])

    model = make_pipeline(
        StandardScaler(),
        # Small and short, to be done in seconds: the defaults are larger.
        DiffusionOutlierDetector(
            contamination=0.05, train_steps=200, options={"token_width": 64}, random_state=0
        ),
    )
    print("labels:", np.unique(model.fit_predict(X), return_counts=True))
    print(f"AUROC of the training data: {roc_auc_score(y, model.score_samples(X)):.3f}")
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    print("cross-validated:", cross_val_score(model, X, y, scoring="roc_auc", cv=folds).round(3))


if __name__ == "__main__":
    main()
