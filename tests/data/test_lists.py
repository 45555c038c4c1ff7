"""Text files that list clips, as people have them: every row is read, or a sentence names it."""

import bz2
import codecs
import gzip
import json
import lzma

import pytest

from flax_distil.config import DataConfig
from flax_distil.data.lists import audio_base, list_kind, names_audio, read_list
from flax_distil.errors import InputError

ROWS = [("a.flac", "One, two."), ("b.flac", "Drei"), ("c.flac", "quatre")]
CSV = 'file_name,text\na.flac,"One, two."\nb.flac,Drei\nc.flac,quatre\n'
JSONL = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in ROWS)


def written(path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, **config) -> list[tuple]:
    return [tuple(row.values()) for row in read_list(path, DataConfig("", **config))[0]]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('b.flac,"Well said the guide', '"Well said the guide'),
        ('b.flac,Well said the guide"', 'Well said the guide"'),
        ('b.flac,"Well" said the guide', '"Well" said the guide'),
        ('b.flac,say "yes, no" now', 'say "yes, no" now'),
        ("b.flac,Login incorrect, please enter, then go", "Login incorrect, please enter, then go"),
        ('b.flac,"two\nlines, in one field"', "two\nlines, in one field"),
        ('b.flac,"a ""quoted"" word"', 'a "quoted" word'),
        ("b.flac,ends with commas,,", "ends with commas"),
    ],
)
@pytest.mark.parametrize("quoted", ["plain", '"in, quotes"'])
def test_quotes_and_commas_lose_no_row(tmp_path, line, text, quoted):
    """Rows before and behind stay what they are, quoted or not."""
    around = quoted.strip('"')
    path = written(
        tmp_path / "m.csv", f"file_name,text\na.flac,{quoted}\n{line}\nc.flac,{quoted}\n"
    )
    assert read(path) == [("a.flac", around), ("b.flac", text), ("c.flac", around)]


def test_what_was_guessed_is_told(tmp_path):
    lines = ["file_name,text", 'a.flac,"open', "b.flac,one, two", 'c.flac,"open', "d.flac,fine"]
    _, notes = read_list(written(tmp_path / "m.csv", "\n".join(lines)), DataConfig(""))
    assert notes == (
        "unpaired quotes read as text: 2 (line 2, 4)",
        "delimiters outside quotes read as text: 1 (line 3)",
    )


def test_a_surplus_field_goes_to_text_or_name_or_is_refused(tmp_path):
    head = "text,file_name,speaker\n"
    path = written(tmp_path / "a.csv", head + 'yes, no,a.flac,s\nfine,"b.flac",t\n')
    assert read(path) == [("yes, no", "a.flac", "s"), ("fine", "b.flac", "t")]
    path = written(tmp_path / "b.csv", "file_name,text\nhello, world.wav,yes\n")
    assert read(path) == [("hello, world.wav", "yes")]
    path = written(tmp_path / "c.csv", "file_name,text,normalized_text\na.flac,b,c,d\n")
    with pytest.raises(InputError, match=r"c\.csv line 2 has 4 fields for 3 columns.*put quotes"):
        read(path)
    assert read(path, text_column="normalized_text") == [("a.flac", "b", "c,d")]


def test_a_long_field_and_many_open_quotes(tmp_path):
    """No limit on a field, and no time that grows with the square of the rows."""
    path = written(tmp_path / "a.csv", f"file_name,text\na.flac,{'long ' * 50_000}\n")
    assert len(read(path)[0][1]) == 250_000
    rows = "".join(f'{n},"open quote {n}\n' for n in range(1_500))
    assert len(read(written(tmp_path / "b.csv", "path,text\n" + rows))) == 1_500


@pytest.mark.parametrize("content", [CSV, JSONL], ids=["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_encodings(tmp_path, content, encoding, ending):
    suffix = "csv" if content is CSV else "jsonl"
    path = written(tmp_path / f"m.{suffix}", content.replace("\n", ending).encode(encoding))
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed(tmp_path, suffix, pack):
    path = written(tmp_path / f"m.jsonl.{suffix}", pack(JSONL.encode()))
    assert list_kind(path) == ".jsonl"
    assert read(path) == ROWS
    cut = written(tmp_path / f"cut.csv.{suffix}", pack(CSV.encode())[:-9])
    with pytest.raises(InputError, match="is damaged"):
        read(cut)


def in_columns(rows, kind=list):
    names = ("file_name", "text")
    return {name: kind(row[name] for row in rows) for name in names}


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        lambda rows: {"version": 1, "data": rows},
        in_columns,
        lambda rows: in_columns(rows, lambda column: {str(n): x for n, x in enumerate(column)}),
    ],
    ids=["array", "object", "columns", "pandas"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_documents(tmp_path, wrap, indent):
    rows = [{"file_name": name, "text": text} for name, text in ROWS]
    assert read(written(tmp_path / "m.json", json.dumps(wrap(rows), indent=indent))) == ROWS
    assert read(written(tmp_path / "n.json", JSONL)) == ROWS
    assert read(written(tmp_path / "o.json", JSONL.splitlines()[0])) == ROWS[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000 + "]" * 200_000, "not JSON"),
        ('\n{"audio": ' + "[" * 200_000, "line 2 is not JSON"),
        ('{"audio": ' + "9" * 10_000 + "}", "line 1 is not JSON"),
        ('[{"audio": "a"}, 3]', "row 2 must be an object"),
        ('{"audio": "a"}\n{"audio"', "line 2 is not JSON"),
        (b'{"audio": "a", "text": "caf\xe9"}', r"not UTF-8 text \(line 1, column text\)"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a", "is damaged"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path / "m.jsonl", content))


def test_names_may_be_any_bytes(tmp_path):
    """A file name is what it is on disk; a text that is no UTF-8 would be learnt wrongly."""
    path = written(tmp_path / "m.csv", b"file_name,text\nlatin-\xe9.flac,fine\n")
    assert read(path) == [("latin-\udce9.flac", "fine")]
    with pytest.raises(InputError, match=r"line 3, column text\): save it as UTF-8"):
        read(written(tmp_path / "n.csv", b"file_name,text\na.wav,b\nc.wav,caf\xe9\n"))


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_delimiters(tmp_path, delimiter):
    content = "".join(delimiter.join(row) + "\n" for row in [("path", "sentence"), *ROWS])
    for name in ("m.tsv", "m.csv"):
        assert read(written(tmp_path / name, content)) == ROWS


def test_usual_names_in_other_letters(tmp_path):
    path = written(tmp_path / "m.csv", "File_Name, TEXT,Mine\na.flac,b,c\n")
    assert read_list(path, DataConfig(""))[0] == [{"file_name": "a.flac", "text": "b", "Mine": "c"}]
    named = read_list(path, DataConfig("", text_column="TEXT"))[0]
    assert named == [{"file_name": "a.flac", "TEXT": "b", "Mine": "c"}]


def test_without_a_header(tmp_path):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "LJ001-0001.wav").touch()
    ljspeech = written(
        tmp_path / "metadata.csv",
        'LJ001-0001|"Printing", in 1455|"Printing", in fourteen\nLJ001-0002|b|c\n',
    )
    assert read(ljspeech) == [
        ("LJ001-0001", '"Printing", in 1455', '"Printing", in fourteen'),
        ("LJ001-0002", "b", "c"),
    ]
    assert read(written(tmp_path / "a.csv", "a.wav,hello\nb.wav,you\n")) == [
        ("a.wav", "hello"),
        ("b.wav", "you"),
    ]
    with pytest.raises(InputError, match="4 columns without names: add a first line"):
        read(written(tmp_path / "b.csv", "a.wav,x,y,z\n"))


def test_where_names_start(tmp_path):
    for name in ("clips/a.mp3", "wavs/b.wav", "c.flac", "deep/list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert audio_base(folder, ["gone.mp3", "a.mp3"]) == (f"{folder}/clips", "")
    assert audio_base(folder, ["b"]) == (f"{folder}/wavs", ".wav")
    assert audio_base(f"{folder}/deep", ["c.flac"]) == (f"{folder}/deep/..", "")
    assert audio_base(folder, ["no\0name", "n" * 5000]) == (folder, "")


def test_which_files_are_lists(tmp_path):
    config = DataConfig("")
    assert names_audio(written(tmp_path / "a.csv", CSV), config)
    assert names_audio(written(tmp_path / "b.jsonl", JSONL), config)
    for name, content in [
        ("settings.json", '{"rate": 16000}'),
        ("broken.json", "{"),
        ("empty.csv", ""),
        ("numbers.tsv", "a\tb\n1\t2\n"),
        ("cut.csv.gz", gzip.compress(b"file_name")[:-3]),
    ]:
        assert not names_audio(written(tmp_path / name, content), config), name
    other = written(tmp_path / "c.csv", "wav,words\na.flac,b\n")
    assert not names_audio(other, config)
    assert names_audio(other, DataConfig("", audio_column="wav"))
