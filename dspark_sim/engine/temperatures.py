"""Files of confidence temperatures: this package's own and SGLang's.

Both are one JSON object with ``temperatures``, one positive number for each slot of a block. SGLang reads its file
with ``--speculative-dspark-confidence-sts-path`` (its class ``DSparkStsCalibration``): beside the temperatures it may
hold ``dataset`` (text), ``num_samples`` (whole number), ``ece_before`` and ``ece_after`` (one number per slot). It
ignores other keys, wants as many temperatures as the block has slots, and computes σ(logit / T) as here. Ours has the
same keys and adds which drafter, target and source of confidence the temperatures were fitted to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, get_args

from dspark_sim.engine.drafters.choose import Confidence, ConfidenceKind
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import write_json

FILE_NAME = "temperatures.json"
"""In a drafter's folder: used unless another source of confidence is asked for."""


@dataclass(frozen=True, slots=True)
class TemperatureFile:
    """Fitted temperatures and where they come from.

    Parameters
    ----------
    confidence
        The source of the estimates, with the temperatures to use them at.
    drafter, target
        Names; empty where unknown, as in SGLang's files.
    dataset
        What they were fitted to, in words.
    num_samples
        Blocks that they were fitted to.
    ece_before, ece_after
        Expected calibration error of the survival at each slot, without and with them; empty where unknown.
    notes
        Whatever else is worth keeping, as JSON values.
    """

    confidence: Confidence
    drafter: str = ""
    target: str = ""
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path | str) -> None:
        """Write this package's form.

        Raises
        ------
        UserError
            If there are no temperatures or the file cannot be written.
        """
        source = asdict(self.confidence)
        del source["temperatures"]
        named = {"drafter": self.drafter, "target": self.target, "confidence": source, "notes": self.notes}
        _write(Path(path), {**self._common(), **named})

    def write_sglang(self, path: Path | str) -> None:
        """Write SGLang's form, nothing but the keys that it knows.

        Raises
        ------
        UserError
            As `write`.
        """
        _write(Path(path), self._common())

    def _common(self) -> dict[str, Any]:
        return {
            "temperatures": list(self.confidence.temperatures),
            "dataset": self.dataset,
            "num_samples": self.num_samples,
            "ece_before": list(self.ece_before),
            "ece_after": list(self.ece_after),
        }


def read_temperatures(path: Path | str) -> TemperatureFile:
    """Read either form; a file without a source of confidence is taken as for the drafter's head, as SGLang does.

    Raises
    ------
    UserError
        If there is no such file or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no temperature file at {path}; make one with `dspark-sim calibrate`")
    with explain_os_errors(path, "read"):
        text = path.read_bytes()
    try:
        document = json.loads(text)
        temperatures = _numbers(document["temperatures"])
        if not temperatures or not all(0 < temperature < inf for temperature in temperatures):
            raise ValueError(f"the temperatures are {list(temperatures)}, not one positive number or more")
        source = document.get("confidence", {})
        if source.get("kind", "head") not in get_args(ConfidenceKind):
            raise ValueError(f"confidence is of kind {source['kind']!r}")
        return TemperatureFile(
            Confidence(
                source.get("kind", "head"),
                float(source.get("intercept", 0.0)),
                float(source.get("slope", 1.0)),
                temperatures,
            ),
            str(document.get("drafter", "")),
            str(document.get("target", "")),
            str(document.get("dataset", "")),
            int(document.get("num_samples", 0)),
            _numbers(document.get("ece_before", ())),
            _numbers(document.get("ece_after", ())),
            dict(document.get("notes", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a temperature file ({type(error).__name__}: {error}); make one with `dspark-sim calibrate`"
        ) from error


def calibrated_confidence(path: Path | str, source: Confidence, drafter: str | None = None) -> Confidence:
    """A source of confidence at the temperatures in a file.

    Parameters
    ----------
    path
        The file.
    source
        Where confidence comes from.
    drafter
        Name or folder of the drafter; ``None`` does not check.

    Raises
    ------
    UserError
        If the file cannot be read, or was fitted to another source or drafter.
    """
    file = read_temperatures(path)
    if drafter is not None and file.drafter not in ("", Path(drafter).name):
        raise UserError(
            f"{path} was fitted to drafter {file.drafter} and this one is {Path(drafter).name}; make its own with "
            f"`dspark-sim calibrate --drafter {drafter}`"
        )
    fitted_to = replace(file.confidence, temperatures=())
    if fitted_to != replace(source, temperatures=()):
        raise UserError(
            f"{path} was fitted to {_described(fitted_to)} and this is {_described(source)}; choose the same "
            "--confidence, or make another file with `dspark-sim calibrate`"
        )
    return file.confidence


def default_confidence(folder: Path) -> Confidence | None:
    """What a drafter's folder says of its confidence: that of its ``temperatures.json``, or ``None`` without one.

    Raises
    ------
    UserError
        If the file cannot be read.
    """
    path = folder / FILE_NAME
    return read_temperatures(path).confidence if path.is_file() else None


def _described(source: Confidence) -> str:
    numbers = f" ({source.intercept:g} + {source.slope:g} · gap)" if source.kind == "margin" else ""
    return f"confidence {source.kind}{numbers}"


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{str(values)[:40]} is no list of numbers")
    return tuple(float(value) for value in values)


def _write(path: Path, document: dict[str, Any]) -> None:
    if not document["temperatures"]:
        raise UserError("zero temperatures to write; fit them first")
    write_json(path, document)
