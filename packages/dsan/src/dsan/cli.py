"""The verbs of ``dsan``."""

from papercore.lab.cli import App

app = App("dsan", help="read words in images, with text attention and two supervisions")
app.command("train", "dsan.train:train", help="train a recogniser; on rendered words without data of your own")
app.command("eval", "dsan.evaluate:evaluate_checkpoint", help="word accuracy of a checkpoint on labelled crops")
app.command("read", "dsan.read:read", help="the words in image files, as a table or JSON, with attention maps")
app.command("synth", "dsan.synth:synth", help="render words with labels, text masks and character boxes")
app.command("convert", "dsan.convert:convert", help="labelled crops from LMDB, folder, JSON or zip to another of these")
app.command("export", "dsan.export:export", help="ONNX or torch.export program of a checkpoint, any batch and width")
app.add_study("dsan.study:study")
app.command("compare", "dsan.compare:compare", help="McNemar's test between the arms of a study that was reproduced")

if __name__ == "__main__":
    raise SystemExit(app())
