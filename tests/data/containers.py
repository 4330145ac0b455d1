"""Parquet files, saved data sets and tar shards, written as their own tools write them."""

import io
import json
import tarfile


def table(rows):
    """A pyarrow table of rows; images as Hugging Face's structure."""
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def write_parquet(path, rows, **options):
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(rows), path, **options)
    return path


def write_saved(folder, parts, features=None):
    """A folder as `Dataset.save_to_disk` writes it, of one Arrow file for each list of rows."""
    import pyarrow.ipc

    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        made = table(rows)
        if features is not None:
            noted = json.dumps({"info": {"features": features}}).encode()
            made = made.replace_schema_metadata({"huggingface": noted})
        with pyarrow.ipc.new_stream(folder / name, made.schema) as stream:
            stream.write_table(made, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def write_tar(path, members):
    """A shard of (name, bytes), or TarInfo for what is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                archive.addfile(name)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def example(key, image=None, text=None, noted=None):
    """The members of one example, as img2dataset orders them."""
    parts = []
    if image is not None:
        parts.append((f"{key}.jpg", image))
    if noted is not None:
        parts.append((f"{key}.json", json.dumps(noted).encode()))
    if text is not None:
        parts.append((f"{key}.txt", text.encode()))
    return parts
