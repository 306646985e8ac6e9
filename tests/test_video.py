"""From video files to pixels: evenly spaced frames, one line for what cannot be read, and what towers are given."""

import clips
import numpy as np
import pytest
import stock
import stock_folders
import torch
from PIL import Image
from tiny import SIDE, batch, ours, prompt, run

from eval.run.asking import UnfitQuestion
from eval.run.inference import LoadedModel
from eval.run.visuals import open_visual, placed
from llava import video as videos
from llava.video import FrameProcessor, Video, frame_indices, load_video, process_video
from mustdrop import load_reducer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(("total", "expected"), [(8, range(8)), (15, range(0, 15, 2)), (9, [0, 1, 2, 3, 4, 5, 6, 8])])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(total, expected):
    assert frame_indices(total) == list(expected)


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "ffv1"), ("mkv", "ffv1"), ("mp4", "mpeg4"), ("avi", "mpeg4")])
@pytest.mark.parametrize("total", [8, 15, 31])
def test_the_frames_of_a_file_are_those_numbers_whatever_its_header_says(suffix, codec, total, tmp_path):
    drawn = clips.frames(total)
    found = load_video(clips.write(tmp_path / f"clip.{suffix}", drawn, codec))
    assert len(found.frames) == 8 and found.size == (96, 96) and found.name.endswith(suffix)
    for frame, wanted in zip(found.frames, drawn[frame_indices(total)], strict=True):
        assert np.abs(np.asarray(frame, int) - wanted)[2:6, 2:6].max() <= (0 if codec == "ffv1" else 16)
        assert frame.mode == "RGB"


def test_frames_are_counted_where_packets_and_headers_say_another_number(tmp_path, monkeypatch):
    file = clips.write(tmp_path / "clip.avi", clips.frames(15))
    honest = [np.asarray(frame) for frame in load_video(file).frames]
    for packets, declared in ((40, 0), (9, 15), (15, 3)):
        monkeypatch.setattr(videos, "_count_packets", lambda path, said=(packets, declared): said)
        assert all(map(np.array_equal, map(np.asarray, load_video(file).frames), honest))


@pytest.mark.parametrize("total", [2, 3, 7])
def test_of_a_short_video_some_frames_are_shown_again_and_it_is_said(total, tmp_path, caplog):
    drawn = clips.frames(total)
    found = load_video(clips.write(tmp_path / "x.avi", drawn))
    for frame, number in zip(found.frames, np.linspace(0, total - 1, 8).astype(int), strict=True):
        assert np.array_equal(np.asarray(frame), drawn[number])
    assert f"it has {total} frames, of the 8 shown some are the same" in caplog.text


def test_a_gif_is_a_video(tmp_path):
    drawn = [Image.fromarray(frame) for frame in clips.frames(9)]
    drawn[0].save(tmp_path / "x.gif", save_all=True, append_images=drawn[1:], duration=100)
    found = [int(np.asarray(frame)[2:6, 2:6].mean()) for frame in load_video(tmp_path / "x.gif").frames]
    assert np.abs(np.array(found) - 16 * np.array([0, 1, 2, 3, 4, 5, 6, 8])).max() <= 8


ONE, UNIT = 1 << 16, 1 << 30
SHOWN = {  # by the first two rows of a display matrix, what stands top left, top right, bottom left, bottom right
    (ONE, 0, 0, 0, ONE): "abcd",
    (-ONE, 0, 0, 0, ONE): "badc",
    (ONE, 0, 0, 0, -ONE): "cdab",
    (-ONE, 0, 0, 0, -ONE): "dcba",
    (0, ONE, 0, -ONE, 0): "cadb",
    (0, -ONE, 0, ONE, 0): "bdac",
    (0, ONE, 0, ONE, 0): "acbd",
    (0, -ONE, 0, -ONE, 0): "dbca",
}


@pytest.mark.parametrize(("matrix", "shown"), SHOWN.items(), ids=SHOWN.values())
def test_frames_are_shown_upright_as_images_are(matrix, shown, tmp_path):
    """A phone's film: four grey levels in the corners, stored as the sensor lay."""
    levels = {"a": 20, "b": 90, "c": 160, "d": 230}
    drawn = np.zeros((8, 64, 96, 3), np.uint8)
    for letter, rows, columns in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0), ("d", 1, 1)):
        drawn[:, 32 * rows : 32 * rows + 32, 48 * columns : 48 * columns + 48] = levels[letter]
    file = bytearray(clips.write(tmp_path / "x.mp4", drawn, "mpeg4").read_bytes())
    place = file.index(b"tkhd") + 44  # version 0: the matrix follows 40 bytes of other facts
    file[place : place + 36] = np.array([*matrix, 0, 0, 0, UNIT], ">i4").tobytes()
    (tmp_path / "x.mp4").write_bytes(file)
    found = load_video(tmp_path / "x.mp4")
    assert found.size == ((96, 64) if matrix[0] else (64, 96))
    grey = np.asarray(found.frames[0], int).mean(-1)
    corners = [grey[8, 8], grey[8, -8], grey[-8, 8], grey[-8, -8]]
    assert "".join(min(levels, key=lambda letter: abs(levels[letter] - corner)) for corner in corners) == shown


def missing(folder):
    return folder / "none.mp4", "there is no such file"


def a_folder(folder):
    return folder, "it is a folder"


def empty(folder):
    (folder / "x.mp4").touch()
    return folder / "x.mp4", "the file is empty"


def noise(folder):
    (folder / "x.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    return folder / "x.mp4", "cannot be read as a video"


def text(folder):
    (folder / "x.txt").write_text("nothing to see here\n" * 5000)
    return folder / "x.txt", "it is text"


def sound(folder):
    return clips.write_sound(folder / "x.wav"), "no pictures"


def too_short(folder):
    return clips.write(folder / "x.avi", clips.frames(1)), "it has 1 frame, expected a video"


def no_frames(folder):
    return clips.write(folder / "x.avi", clips.frames(1)[:0]), "it has no frames, expected a video"


def damaged(folder):
    file = bytearray(clips.write(folder / "x.mkv", clips.frames(16), "libx264").read_bytes())
    for place in np.random.default_rng(0).integers(len(file) // 4, len(file) * 3 // 4, 40):
        file[place] ^= 255
    (folder / "x.mkv").write_bytes(file)
    return folder / "x.mkv", "it is damaged: frame 0 cannot be decoded whole"


def image(folder):
    Image.new("RGB", (64, 64)).save(folder / "x.png")
    return folder / "x.png", "it has 1 frame, expected a video"


def truncated(folder):
    whole = clips.write(folder / "whole.avi", clips.frames(40, width=100), "mpeg4").read_bytes()
    (folder / "x.avi").write_bytes(whole[: len(whole) * 2 // 3])
    return folder / "x.avi", "of its 40 frames can be decoded"


def cut_short(folder):
    whole = clips.write(folder / "whole.mp4", clips.frames(40), "mpeg4").read_bytes()
    (folder / "x.mp4").write_bytes(whole[: len(whole) // 2])
    return folder / "x.mp4", "cannot be read as a video"


def address(folder):
    return "http://localhost/x.mp4", "there is no such file"


def protocol(folder):
    return f"concat:{clips.write(folder / 'x.avi', clips.frames(9))}", "there is no such file"


KINDS = [
    missing,
    a_folder,
    empty,
    noise,
    text,
    sound,
    too_short,
    no_frames,
    damaged,
    image,
    truncated,
    cut_short,
    address,
    protocol,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_no_video_is_one_line_that_names_the_file(kind, tmp_path):
    path, reason = kind(tmp_path)
    with pytest.raises(ValueError) as error:
        load_video(path)
    assert str(error.value).startswith(f"video {str(path)!r}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_frames_with_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "MAX_PIXELS", 96 * 96 - 1)
    with pytest.raises(ValueError, match="its frames have 96 x 96 pixels, more than 9215"):
        load_video(clips.write(tmp_path / "x.avi", clips.frames(8)))


def test_without_pyav_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^video: PyAV is not installed.*\[video\]"):
        load_video(tmp_path / "x.avi")


# Pixels


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8))


def by_hand(frame: Image.Image) -> np.ndarray:
    """Short side 224, centre crop, scale, mean and deviation of CLIP."""
    width, height = frame.size
    size = (224, int(height * 224 / width)) if width <= height else (int(width * 224 / height), 224)
    resized = frame.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    cropped = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    return ((cropped / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(224, 224), (300, 448), (480, 250), (100, 160)])
def test_video_llavas_frames_are_resized_cropped_and_scaled(size):
    frames = [picture(*size)] * 8
    pixels = FrameProcessor({})([frames, frames])["pixel_values_videos"]
    assert pixels.shape == (2, 8, 3, 224, 224) and pixels.dtype == torch.float32
    assert np.abs(pixels[1, 5].numpy() - by_hand(frames[0])).max() < 1e-5


def test_what_a_folder_says_of_frames_is_obeyed():
    said = {"size": {"height": 84, "width": 84}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = FrameProcessor(said)
    assert processor.size == (84, 84)
    pixels = processor([[picture(100, 160)]])["pixel_values_videos"]
    expected = np.asarray(picture(100, 160).resize((84, 84), Image.Resampling.BICUBIC)) / 255 * 2 - 1
    assert np.abs(pixels[0, 0].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5
    with pytest.raises(ValueError, match=r"^videos: got \[1, 2\] frames in one batch"):
        processor([[picture(9, 9)], [picture(9, 9)] * 2])


# Prompts


def test_places_in_a_question_are_those_of_its_visuals():
    assert placed("a <image> b <video> c", ["image", "video"]) == ["a ", " b ", " c"]
    for question, kinds in (("a <video> b <image>", ["image", "video"]), ("what is <image>?", ["video"]), ("a", [])):
        assert placed(question, kinds) is None
    assert placed("is <image> a word in <video>?", ["video"]) == ["is <image> a word in ", "?"]


def a_video(seed: int = 0, count: int = 8) -> Video:
    return Video(tuple(Image.fromarray(frame) for frame in clips.frames(count, seed=seed)), f"clip{seed}")


def test_our_own_llava_takes_a_video_as_one_image_of_its_frames(loaded):
    pictures = [a_video(1), picture(90, 60)]
    text = loaded.prompt_about("what moves?", pictures)
    assert text.count("<image>") == 2 and "<video>" not in text
    given = loaded.prepare([text], [pictures])
    frames, image = given["images"]
    assert frames.shape == (8, 3, 84, 84) and image.shape == (3, 84, 84)
    single = loaded.prepare([text], [[pictures[0].frames[3], pictures[1]]])["images"][0]
    assert torch.equal(frames[3], single)
    with load_reducer({"method": "divprune", "retain": 20}).on(loaded.model) as traced:
        loaded.answer([text], [pictures], max_new_tokens=2)
    assert [one["views"] for one in traced.traces[0].images] == [8, 1]
    assert [one["tokens"] for one in traced.traces[0].images] == [20, 20]


def test_equal_videos_are_one_tensor_and_no_image_is_taken_for_a_video(loaded):
    still = picture(84, 84)
    shown = [a_video(1), a_video(1), a_video(2), Video((still,)), still]
    images = loaded.prepare(["<image>"] * 5, [[one] for one in shown])["images"]
    assert images[0] is images[1] and not torch.equal(images[0], images[2])
    assert images[3].shape == (1, 3, 84, 84) and images[4].shape == (3, 84, 84)


def test_stitched_views_are_no_frames(loaded):
    class Stitched:
        mm_patch_merge_type = "spatial_unpad"

    with pytest.raises(ValueError, match="^video 'clip0': mm_patch_merge_type is 'spatial_unpad', expected 'flat'"):
        process_video(a_video(), loaded.image_processor, Stitched())


def test_eight_frames_are_one_image_for_budgets_and_alone_what_they_are_in_a_batch():
    frames = torch.randn(8, 3, 14 * SIDE, 14 * SIDE, generator=torch.Generator().manual_seed(0))
    for name, retain in (("divprune", 100), ("vidcom2", 100), ("evs", 200)):
        one = run(ours(), load_reducer({"method": name, "retain": retain}), inputs=prompt(3, 4), images=[frames])[2][0]
        assert one.images[0]["patches"] == 8 * SIDE**2 and one.vision_tokens[0] == retain
        two = run(
            ours(), load_reducer({"method": name, "retain": retain}), **batch([prompt(3, 4), prompt(2, 7)]),
            images=[frames, frames[:4]],
        )[2]  # fmt: skip
        assert two[0].kept == one.kept and two[1].vision_tokens[0] == retain


# Stock models


@pytest.fixture(scope="module", params=[("video", "llama"), ("onevision", "qwen2")], ids=lambda kind: kind[0])
def hosted(request, tmp_path_factory, tokenizer_folder) -> LoadedModel:
    folder = stock_folders.save(tmp_path_factory.mktemp("stock") / request.param[0], *request.param, tokenizer_folder)
    return LoadedModel.load(str(folder), device="cpu")


def test_stock_models_take_videos_and_images_in_the_order_of_the_prompt(hosted):
    family = hosted.model.config.model_type
    shown = [a_video(1), picture(90, 60)]
    given = hosted.prepare([hosted.prompt_about("what moves?", shown)], [shown])
    assert given["pixel_values_videos"].shape == (1, 8, 3, stock.PIXELS, stock.PIXELS)
    each = stock.SIDE**2 + 1 if family == "video_llava" else 3 * 3
    videos = int((given["input_ids"] == hosted.model.config.video_token_id).sum())
    assert videos == 8 * each + (family != "video_llava")
    with load_reducer({"method": "divprune", "retain": 12}).on(hosted.model) as traced:
        hosted.answer([hosted.prompt_about("what moves?", shown)], [shown], max_new_tokens=2)
    trace = traced.traces[0]
    assert [one["tokens"] for one in trace.images] == [12, 12] and trace.images[0]["views"] == 8


def test_a_batch_of_videos_answers_as_each_alone(hosted):
    shown = [[a_video(1)], [], [a_video(2)]]
    texts = [hosted.prompt_about(text, own) for text, own in zip(("what moves?", "hi", "how far?"), shown, strict=True)]
    with load_reducer({"method": "vidcom2", "retain": 20}).on(hosted.model) as together:
        answers = hosted.answer(texts, shown, max_new_tokens=3, do_sample=False)
    for text, own, answer, trace in zip(texts, shown, answers, together.traces, strict=True):
        with load_reducer({"method": "vidcom2", "retain": 20}).on(hosted.model) as alone:
            assert hosted.answer([text], [own], max_new_tokens=3, do_sample=False) == [answer]
        assert alone.traces[0].kept == trace.kept


def test_a_model_without_videos_says_so(tmp_path, tokenizer_folder):
    loaded = LoadedModel.load(
        str(stock_folders.save(tmp_path / "next", "next", "llama", tokenizer_folder)), device="cpu"
    )
    with pytest.raises(UnfitQuestion, match="^question: it shows a video, but llava_next takes images only"):
        loaded.prepare([loaded.prompt_about("what moves?", [a_video()])], [[a_video()]])


def test_literal_tokens_are_no_videos(hosted):
    with pytest.raises(UnfitQuestion, match="^question: got 2 video tokens for 1 videos, expected as many"):
        hosted.prepare(["USER: <video> <video> ASSISTANT:"], [[a_video()]])
    text = hosted.prompt_about("what does <video> mean in <video>?", [a_video()])
    assert text.count("<video>") == 1


def test_paths_of_images_and_videos_are_told_apart(tmp_path):
    file = clips.write(tmp_path / "x.avi", clips.frames(9))
    picture(20, 30).save(tmp_path / "x.png")
    assert isinstance(open_visual(str(file)), Video) and open_visual(file) is open_visual(str(file))
    assert open_visual(str(tmp_path / "x.png")).size == (30, 20)
    clips.write(file, clips.frames(12, side=112))
    assert open_visual(str(file)).size == (112, 112)
    with pytest.raises(ValueError, match="it brings a dict, only images, videos and paths"):
        open_visual({"video": "x"})
