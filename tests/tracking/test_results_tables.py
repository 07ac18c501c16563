from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pandas as pd
import pytest
from made_up_sweep import complete, curve, failed, running

from nipq_search.errors import UserError
from nipq_search.file_io import write_bytes
from nipq_search.records import TrialRecord
from nipq_search.tracking import curves_table, read_table, results_table, write_table
from nipq_search.tracking.tables import CURVES, RESULTS


def round_trip(tmp_path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Write with `write_table` and read with pandas."""
    write_table(tmp_path / "table.parquet", frame)
    return pd.read_parquet(tmp_path / "table.parquet")


def test_one_row_per_trial_in_order_after_a_round_trip(tmp_path: Path) -> None:
    frame = results_table([failed(2), complete(0, front=True), complete(1, bits=3), running(3)])
    back = round_trip(tmp_path, frame)
    pd.testing.assert_frame_equal(back, frame)
    assert list(back["trial"]) == [0, 1, 2, 3]
    assert list(back["state"]) == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
    assert json.loads(back["budget"][0]) == {"bops": 16e6}
    assert back["budget_bops"][1] == 9e6
    assert back["cost_weight_bytes"][0] == 2000
    assert back["params_lambda"].dtype == "Int64"
    assert back["test"].notna().tolist() == [True, False, False, False]
    assert back["parent"].isna().tolist() == [True, False, True, True]
    assert back["reason"][2] == "loss became NaN at step 7"
    assert back["started"][0] == pd.Timestamp("2023-11-14 22:13:20", tz="UTC")


def test_params_of_different_types_become_text(tmp_path: Path) -> None:
    values: list[object] = [0, 0.5, "uniform", None, [1, 2]]
    records = [
        TrialRecord(trial=number, state="WAITING", params={"mixed": value, "real": number / 2})
        for number, value in enumerate(values)
    ]
    back = round_trip(tmp_path, results_table(records))
    assert [None if pd.isna(v) else json.loads(v) for v in back["params_mixed"]] == values
    assert back["params_real"].dtype == "float64"


@pytest.mark.parametrize(
    ("frame", "columns"), [(results_table([]), RESULTS), (curves_table({}), CURVES)]
)
def test_an_empty_table_keeps_its_columns(
    tmp_path: Path, frame: pd.DataFrame, columns: dict[str, str]
) -> None:
    back = round_trip(tmp_path, frame)
    assert {name: str(kind) for name, kind in back.dtypes.items()} == columns


def test_curves_have_a_row_per_trial_and_epoch(tmp_path: Path) -> None:
    again = curve(1, 2, late=50.0)
    frame = round_trip(tmp_path, curves_table({1: [*again, *curve(1)], 0: curve(0, 2)}))
    assert list(zip(frame["trial"], frame["epoch"], strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    assert frame["metrics_train_loss"].tolist() == [2.0, 1.0, 2.0, 1.0, 2 / 3]
    assert frame["timestamp"][2].timestamp() == curve(1)[0].timestamp


def test_reading_another_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "results.parquet")
    (tmp_path / "results.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="not a Parquet table"):
        read_table(tmp_path / "results.parquet")


def test_a_table_can_be_read_while_it_is_replaced(tmp_path: Path) -> None:
    path, end = tmp_path / "table.parquet", threading.Event()
    tables = []
    for count in (2, 40):
        write_table(path, results_table([complete(number) for number in range(count)]))
        tables.append(path.read_bytes())

    def write() -> None:
        for table in itertools.cycle(tables):
            write_bytes(path, table)
            if end.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {len(read_table(path)) for _ in range(150)} <= {2, 40}
    finally:
        end.set()
        writer.join()
