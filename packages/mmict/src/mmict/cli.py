"""The command ``mmict``."""

from papercore.lab.cli import App

app = App("mmict", help="fine-tune multi-modal language models with in-context examples (MMICT)")
app.command("train", "mmict.train:train", help="tune a model; writes a checkpoint folder")
app.command("eval", "mmict.evaluate:evaluate", help="judge a checkpoint with and without demonstrations")
app.command("caption", "mmict.describe:caption", help="describe pictures, or a video's frames")
app.command("answer", "mmict.describe:answer", help="answer a question about pictures")
app.add_study("mmict.study:study")

if __name__ == "__main__":
    raise SystemExit(app())
