"""Data: records of a data set, prompts made of them, videos decoded for them.

A source is opened as open_records(root, file) and gives random access: len(), [i] -> Example, and
where(i) -> "file:line". A bad record raises RecordError when it is read.
"""

from longrl_jax.data import longvideo_reason

SOURCES = {"longvideo_reason": longvideo_reason.open_records}
