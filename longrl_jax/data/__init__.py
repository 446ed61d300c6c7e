"""Data: records of a data set, prompts made of them, videos decoded for them.

A source is opened as open_records(root, file) and gives random access: len(), [i] -> Example, and
where(i) -> "file:line" or "file[place]". A bad record raises RecordError when it is read. Formats:
docs/data.md.
"""

from longrl_jax.data import (
    activitynet_qa,
    clevrer,
    easyr1,
    llava_video,
    longvideo_reason,
    longvideobench,
    nextqa,
    perception_test,
    star,
    video_mme,
    vnbench,
)

SOURCES = {
    "longvideo_reason": longvideo_reason.open_records,
    "llava_video": llava_video.open_records,
    "nextqa": nextqa.open_records,
    "perception_test": perception_test.open_records,
    "clevrer": clevrer.open_records,
    "star": star.open_records,
    "image_qa": easyr1.open_image_qa,
    "text_math": easyr1.open_text_math,
    "video_mme": video_mme.open_records,
    "longvideobench": longvideobench.open_records,
    "vnbench": vnbench.open_records,
    "activitynet_qa": activitynet_qa.open_records,
}
