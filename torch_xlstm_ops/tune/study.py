"""Studies of optuna in a SQLite store, which survive a kill: open, check, and read their trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from torch_xlstm_ops.tune.objective import Objective
from torch_xlstm_ops.tune.records import Outcome, Record, from_json

STORE = "study.sqlite"  # its name in a folder of searches
VERSION = 1  # of the attributes of a study
RECORD, ABOUT, RESULT = "record", "about", "result"  # attributes in the store


class StudyName(NamedTuple):
    """The parts of a study's name, as ``prefill-1x4x2048x64x64-float32-cpu-tpe-seed0-energy``."""

    workload: str
    method: str
    seed: int
    objective: Objective = Objective.TIME

    def __str__(self) -> str:
        end = "" if self.objective is Objective.TIME else f"-{self.objective}"
        return f"{self.workload}-{self.method}-seed{self.seed}{end}"

    @classmethod
    def read(cls, text: str) -> StudyName:
        """Return the parts of a name that `str` made."""
        objective = next((one for one in (Objective.ENERGY, Objective.PRODUCT) if text.endswith(f"-{one}")),
                         Objective.TIME)
        workload, method, seed = text.removesuffix(f"-{objective}").rsplit("-", 2)
        return cls(workload, method, int(seed.removeprefix("seed")), objective)


class StoreError(RuntimeError):
    """A store cannot be used."""


def open_store(path: Path) -> optuna.storages.RDBStorage:
    """Open the SQLite store in a file; create it if there is none.

    Raises StoreError for a file that is no store, or that another version of optuna wrote.
    """
    try:
        return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    except Exception as error:  # sqlalchemy's DatabaseError, optuna's RuntimeError, alembic's CommandError
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} must be a store of this version of optuna ({optuna.__version__}), got "
                         f"{type(error).__name__}: {reason}") from error


def open_study(
    store: optuna.storages.BaseStorage, name: str, about: Mapping[str, Any], sampler: Any, *, resume: bool
) -> optuna.Study:
    """Open a study by its name; create it if there is none.

    about: machine, versions and search space, which must be the same in a resumed study.
    Raises StoreError if the study exists and `resume` is false, or `about` differs.
    """
    if name in names(store) and not resume:
        raise StoreError(f"--out must be a folder without the study {name}, or come with --resume")
    study = optuna.create_study(storage=store, study_name=name, sampler=sampler, direction="maximize",
                                load_if_exists=True)
    wanted = {"version": VERSION, **about}
    if ABOUT not in study.user_attrs and not study.get_trials(deepcopy=False):  # new, or killed before this line
        study.set_user_attr(ABOUT, wanted)
    found = study.user_attrs.get(ABOUT, {})
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            raise StoreError(f"the store must be of this {key} to go on, {wanted.get(key)!r}, got {found.get(key)!r}: "
                             f"start anew in another --out")
    return study


def names(store: optuna.storages.BaseStorage) -> list[str]:
    """Return the names of a store's studies."""
    found: list[str] = optuna.study.get_all_study_names(store)
    return found


def all_records(store: optuna.storages.BaseStorage) -> list[Record]:
    """Return the finished trials of all studies of a store."""
    return [record for name in names(store) for record in records(optuna.load_study(study_name=name, storage=store))]


def records(study: optuna.Study) -> list[Record]:
    """Return the finished trials of a study."""
    return [from_json(trial.user_attrs[RECORD]) for trial in study.get_trials(deepcopy=False)
            if RECORD in trial.user_attrs and trial.state.is_finished()]


def verdict(record: Record) -> tuple[float | None, TrialState]:
    """Return the value and the state of a trial for optuna."""
    if record.reward is not None:
        return record.reward, TrialState.COMPLETE
    return None, TrialState.PRUNED if record.outcome is Outcome.REFUSED else TrialState.FAIL


def finish_killed(study: optuna.Study) -> None:
    """End the trials of a killed process: by their record if they have one, else as failed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if RECORD in trial.user_attrs:
            study.tell(trial.number, *verdict(from_json(trial.user_attrs[RECORD])))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
