import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from fedhead.simulations.benchmarks.heads import OURS, best_of


def test_the_best_candidate_is_chosen_on_training_rows_and_fitted_on_all() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 150)
    features = generator.normal(size=(150, 2)) * 0.1 + labels[:, None]
    train, test = (features[:120], labels[:120]), (features[120:], labels[120:])
    fitted = []

    class Noted(KNeighborsClassifier):
        def fit(self, rows: np.ndarray, targets: np.ndarray) -> "Noted":
            fitted.append((self.n_neighbors, len(rows)))
            return super().fit(rows, targets)

    assert best_of([lambda: Noted(96), lambda: Noted(3)], train, test) > 0.9
    assert fitted == [(96, 96), (3, 96), (3, 120)]


def test_every_head_of_the_table_is_a_run() -> None:
    assert {settings.get("lift", "none") for settings in OURS.values()} == {
        *("none", "landmarks:1024", "relu:2048", "auto")
    }
