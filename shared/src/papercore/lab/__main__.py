"""``papercore list`` and ``papercore reproduce``: the studies of every installed package."""

from papercore.lab.cli import App

app = App("papercore", help="the studies of the installed paper packages")
app.command("list", "papercore.lab.installed:show", help="the installed packages and what each is about")
app.command(
    "reproduce", "papercore.lab.installed:reproduce", help="their comparisons in turn, with one table at the end"
)

if __name__ == "__main__":
    raise SystemExit(app())
