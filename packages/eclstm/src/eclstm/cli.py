"""The verbs of ``eclstm``."""

from papercore.lab.cli import App

app = App("eclstm", help="remaining useful life with an embedded convolutional LSTM")
app.command("train", "eclstm.trainer:train", help="train a regressor; writes a checkpoint folder")
app.command("eval", "eclstm.evaluate:evaluate_checkpoint", help="RMSE and Score of a checkpoint, labels capped and raw")
app.command("predict", "eclstm.predict:predict", help="sensor histories in, remaining life of each unit out")
app.command("tune", "eclstm.tune:tune", help="search architecture and training by Bayesian optimisation and Hyperband")
app.command("export", "eclstm.export:export", help="write a checkpoint as ONNX, to run without Python")
app.add_study("eclstm.study:study")

if __name__ == "__main__":
    raise SystemExit(app())
