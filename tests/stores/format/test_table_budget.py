"""A small table that stands for far more than its bytes is refused before it takes that memory."""

import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.tables import SAMPLES_SCHEMA, parse_table, table_pieces

WORD = "x" * 20_000


def parquet(column, **options):
    sink = pa.BufferOutputStream()
    table = pa.table({"row": pa.array(range(len(column)), pa.int64()), "text": column})
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    return sink.getvalue()


SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string())])


@pytest.mark.parametrize("n_rows", [100_000, 3_000_000])
def test_one_word_that_stands_many_times_is_counted_as_often(n_rows):
    words = pa.DictionaryArray.from_arrays(pa.array([0] * n_rows, pa.int32()), pa.array([WORD]))
    data = parquet(words, store_schema=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptStoreError, match=r"bomb .*, more than|bomb .*than a table of its size can"):
        parse_table(pa.BufferReader(data), SCHEMA, where="bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_a_column_that_inflates_is_refused():
    data = parquet(pa.array([WORD] * 20_000), use_dictionary=False)
    assert len(data) < 1_000_000
    with pytest.raises(CorruptStoreError, match="bomb claims 400"):
        parse_table(pa.BufferReader(data), SCHEMA, where="bomb")


def test_tables_as_large_datasets_have_them_are_within_the_budget():
    n = 200_000
    rows = (
        (i, f"train/class-{i % 1000:04d}/image-{i:08d}.jpeg", 0, "train", f"train/{i:08d}.jpeg", f"{i:064x}")
        for i in range(n)
    )
    data = b"".join(table_pieces(SAMPLES_SCHEMA, rows))
    table = parse_table(pa.BufferReader(data), SAMPLES_SCHEMA, where="samples")
    assert table.schema.equals(SAMPLES_SCHEMA)
    assert (table.num_rows, table["split"][n - 1].as_py()) == (n, "train")
