"""Together with another PyOD detector: the mean of their standardised scores."""

import numpy as np
from pyod.models.knn import KNN
from pyod.utils.data import generate_data
from pyod.utils.utility import standardizer
from sklearn.metrics import roc_auc_score

from diffad_fast.integrations.pyod import DiffAD


def main() -> None:
    X, X_test, _, y_test = generate_data(
        n_train=400, n_test=200, n_features=8, contamination=0.1, random_state=0
    )
    detectors = [DiffAD(train_steps=60, options={"token_width": 64}, random_state=0), KNN()]
    train = np.stack([d.fit(X).decision_scores_ for d in detectors], axis=1)
    test = np.stack([d.decision_function(X_test) for d in detectors], axis=1)
    combined = standardizer(train, test)[1].mean(axis=1)
    for name, scores in (("DiffAD", test[:, 0]), ("KNN", test[:, 1]), ("mean", combined)):
        print(f"{name:7} AUROC {roc_auc_score(y_test, scores):.3f}")
    print("probabilities:", detectors[0].predict_proba(X_test[:2]).round(2).tolist())


if __name__ == "__main__":
    main()
