"""The command ``iqa-distill``."""

from papercore.lab.cli import App

app = App(
    "iqa-distill",
    help="no-reference image quality that learns from a teacher which compares with pristine images (RKIQT)",
)
app.command(
    "train", "iqa_distill.train:train", help="train a student with all its teachers; writes a checkpoint folder"
)
app.command(
    "teacher",
    "iqa_distill.train_teacher:teacher",
    help="train a NAR-teacher, which compares with unrelated pristine images",
)
app.command("eval", "iqa_distill.evaluate:evaluate", help="correlations of a checkpoint's scores with a data set's")
app.command("score", "iqa_distill.score:score", help="score files, folders or globs of images; table, CSV or JSON")
app.command("export", "iqa_distill.export:export", help="write a checkpoint as ONNX or a torch program")
app.command("compare", "iqa_distill.compare:compare", help="gains between the arms of a study that was reproduced")
app.add_study("iqa_distill.study:study")

if __name__ == "__main__":
    raise SystemExit(app())
