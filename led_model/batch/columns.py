"""Takes columns out of the batches of other libraries, and adds columns to them, without importing these libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kind:
    """Says what a column holds beside ``None``: values of ``name``, which is Arrow's of a type.

    A "list" is one of strings, and a "struct" has numbers by the names ``fields``.
    """

    name: str
    fields: tuple[str, ...] = ()

    def of_arrow(self) -> Any:
        """Returns Arrow's type."""
        import pyarrow as pa

        if self.name == "list":
            return pa.list_(pa.string())
        if self.name == "struct":
            return pa.struct([(field, pa.float64()) for field in self.fields])
        return pa.type_for_alias(self.name)

    def of_pandas(self) -> Any:
        """Returns a dtype of pandas that knows missing values, and does not depend on whether there are some."""
        import pandas as pd

        known = {"string": "string", "int64": "Int64", "double": "Float64", "bool": "boolean"}
        if self.name in known:
            return known[self.name]
        return pd.ArrowDtype(self.of_arrow()) if _is_imported("pyarrow") else object


STRING, INTEGER, NUMBER, BOOLEAN = Kind("string"), Kind("int64"), Kind("double"), Kind("bool")
STRINGS = Kind("list")


@dataclass(frozen=True)
class Column:
    """Holds a new column, of which ``None`` are missing values."""

    name: str
    kind: Kind
    values: list[Any]


def names_of(batch: Any) -> list[str]:
    """Returns the names of a batch's columns.

    Raises:
        TypeError: when it is no batch.
    """
    if _is_arrow(batch):
        return batch.column_names
    if _is_frame(batch) or isinstance(batch, Mapping):
        return [str(name) for name in batch]
    raise TypeError(
        f"a batch is a dict of columns, a DataFrame or a pyarrow.Table, and this is a {type(batch).__name__}; give "
        "map_batches a batch_format, or datasets.map batched=True."
    )


def values_of(batch: Any, name: str) -> list[Any]:
    """Returns a column as Python values, where an array in a row is a list.

    Raises:
        ValueError: when there is no such column.
    """
    if name not in (names := names_of(batch)):
        known = ", ".join(map(repr, names[:8])) or "none"
        raise ValueError(f"there is no column {name!r} but {known}; name the column that is meant.")
    table = _table_behind(batch)
    if table is not None:
        return table.column(name).to_pylist()
    values = batch[name]
    if isinstance(values, str) or not isinstance(values, (Sequence, Iterable)):
        raise TypeError(
            f"column {name!r} is a {type(values).__name__} and no list of rows; give datasets.map batched=True."
        )
    return [value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value for value in values]


def with_columns(batch: Any, columns: Sequence[Column]) -> Any:
    """Returns a batch with all columns it has, and with new ones after them.

    It is of the same kind but where that could not say of which type a column without a value is: for a batch of
    ``datasets.map`` it is the ``pyarrow.Table`` behind it, and the new columns of ray.data's dict of NumPy arrays are
    Arrow's.
    """
    table = _table_behind(batch)
    if table is not None:
        for column in columns:
            table = table.append_column(column.name, _arrow(column))
        return table
    if _is_frame(batch):
        import pandas as pd

        new = {
            column.name: pd.Series(column.values, batch.index, column.kind.of_pandas(), column.name)
            for column in columns
        }
        return batch.assign(**new)
    if not any(isinstance(values, np.ndarray) for values in batch.values()):
        return dict(batch) | {column.name: column.values for column in columns}
    if _is_imported("ray") and _is_imported("pyarrow"):
        return dict(batch) | {column.name: _arrow(column) for column in columns}
    return dict(batch) | {column.name: _objects(column.values) for column in columns}


def _objects(values: list[Any]) -> np.ndarray:
    """Returns an array of the values as they are; NumPy itself would make one of two dimensions of lists."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _arrow(column: Column) -> Any:
    import pyarrow as pa

    return pa.array(column.values, column.kind.of_arrow())


def _table_behind(batch: Any) -> Any:
    """Returns the ``pyarrow.Table`` that a batch is, or that a batch of ``datasets.map`` shows; else ``None``."""
    if _is_arrow(batch):
        return batch
    table = getattr(batch, "pa_table", None)
    return table if _is_arrow(table) else None


def _is_arrow(batch: Any) -> bool:
    return _is_imported("pyarrow") and isinstance(batch, sys.modules["pyarrow"].Table)


def _is_frame(batch: Any) -> bool:
    return _is_imported("pandas") and isinstance(batch, sys.modules["pandas"].DataFrame)


def _is_imported(name: str) -> bool:
    """Returns whether somebody has imported a library; otherwise no batch is of its kinds."""
    return sys.modules.get(name) is not None
