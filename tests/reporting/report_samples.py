"""A small run on disk, as training writes it, and a report with something in every section."""

import io

import numpy as np
import PIL.Image

from itself_jax import config as config_lib
from itself_jax import evaluate, workdir
from itself_jax.reporting import content

CONFIG = config_lib.Config(batch_size=64, num_epochs=3, warmup_epochs=1, eval_datasets=("jsonl",))
SCORES = (10.0, 40.0, 30.0)  # R@1 after each epoch


def make_run(folder, config=CONFIG, *, finished=True, epochs=3):
    """Writes a run of two lines and a validation an epoch; returns its folder."""
    directory = workdir.Workdir(folder)
    directory.claim(config, "float32", print)
    directory.describe(config, "float32")
    for epoch in range(1, epochs + 1):
        for step in (20 * epoch - 10, 20 * epoch):
            directory.write_metrics(
                {
                    **{"step": step, "epoch": epoch, "loss": 90.0 - step, "loss_tal": 60.0},
                    **{"loss_cid": 30.0 - step, "grad_norm": 2.0, "learning_rate": 1e-5},
                    **{"bank_image": 40 - epoch, "bank_text": 30, "pairs_per_second": 200.0},
                }
            )
        directory.write_metrics(
            {
                **{"step": 20 * epoch, "epoch": epoch, "split": "val", "alpha": 0.5},
                **{"R1": SCORES[epoch - 1], "R5": 50.0, "R10": 60.0},
                **{"mAP": SCORES[epoch - 1] / 2, "mINP": 5.0, "rSum": 150.0},
                "saliency/patches_on_person/mars": 0.25 * epoch,
                "saliency/patches_on_person/layer:10": 0.5,
                "saliency/patches_on_person/layer:2": 0.4,
                "saliency/patches_on_person/chance": 0.3,
            }
        )
    if finished:
        directory.write_json("results/synthetic-test.json", result())
        directory.finish({"step": 20 * epochs, "best_epoch": 2})
    directory.close()
    directory.release()
    return directory.path


def result(dataset="synthetic", **changed):
    """As `evaluate.results` writes it: local 20, fused 30, global 10 of text → image; half back."""
    rows = [
        {"direction": direction, "similarity": similarity}
        | dict.fromkeys(evaluate.METRICS, score / part)
        for direction, part in (("t2i", 1), ("i2t", 2))
        for similarity, score in (("global", 10.0), ("local", 20.0), ("fused@0.68", 30.0))
    ]
    return {
        **{"dataset": dataset, "split": "test", "queries": 1200, "gallery": 600},
        **{"protocol": "val", "chosen_alpha": 0.68, "skipped_queries": {"t2i": 0, "i2t": 3}},
        **{"rows": rows, "captions": "all", "oracle_R1": 83.25, "chance_R1": {"t2i": 0.75}},
        **{"weights": {"source": None, "step": 40}},
        **changed,
    }


def picture(kind: str, shade: int = 128) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 255, (60, 24, 3), np.uint8)
    PIL.Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


CROP = content.Crop("imgs/0001.jpg", picture("JPEG"))
LOST = content.Crop("imgs/lost.jpg", None)
CAPTION = "A woman in a green coat carries a red bag."


def chart(name: str) -> content.Chart:
    return content.Chart(name, f"Title of {name}", picture("PNG"), f"Alt of {name}: 1 to 2.")


def strip(kind: str, first_right: int, *, picture: bool = False) -> content.Strip:
    """Similarity 0.9 minus a hundredth per rank; the second picture cannot be read."""

    def hit(rank):
        answer = {"caption": CAPTION} if picture else {"crop": LOST if rank == 2 else CROP}
        return content.Hit(rank, rank == first_right, 0.9 - rank / 100, **answer)

    asked = {"crop": CROP} if picture else {"caption": CAPTION}
    return content.Strip(
        kind, first_right, 600, tuple(map(hit, range(1, 11))), hit(first_right), **asked
    )


def view(source: str, png: bytes | None = None) -> content.View:
    words = (content.Word("green", 1.0, True), content.Word("coat", 0.25, False))
    return content.View(source, png or picture("PNG"), words, 24, f"24 patches kept by {source}")


def report() -> content.Report:
    """Every section has something in it."""
    views = (view("mars"), view("last")._replace(png=None))
    moments = (content.Moment(1, view("mars"), None), content.Moment(8, view("mars"), 0.375))
    rows = (("local", "20.00"), ("fused@0.68", "30.00"), ("chance", "0.75"))
    return content.Report(
        title="synthetic, MARS + ATS",
        state="finished",
        asked="synthetic test, α = 0.3",
        followed="synthetic val",
        facts=(("Device", "1 x cpu"), ("Steps", "1,386")),
        differences=(("batch_size", "256", "64"), ("data_root", "None", "'" + "/data" * 40 + "'")),
        results=(content.Table("synthetic test", ("similarity", "R@1"), rows, 1),),
        curves=(chart("loss"), chart("grad_norm")),
        fusion=(chart("fusion"),),
        text_to_image=(strip("best", 1), strip("median", 7), strip("worst", 412)),
        image_to_text=(strip("best", 1, picture=True), strip("worst", 550, picture=True)),
        overlays=(content.Overlay(content.Crop("imgs/0002.jpg", None), CAPTION, views),),
        evolutions=(content.Evolution("imgs/0003.jpg", CAPTION, moments),),
        measured=(chart("measured-pointing"),),
        failures=(strip("worst", 600), strip("worst", 412)),
        notes=("1 of 12 pictures cannot be read.",),
    )
