"""What can be refused before a command is loaded, and its first line."""

from jsonargparse import Namespace

from bayes_router.files import CONFIG, check_folder_for, require_file
from bayes_router.integrations.patch.shipped import folder_of


def say(line: str) -> None:
    """A first line, before anything is loaded."""
    print(line, flush=True)


def check_folder(options: Namespace) -> None:
    """Refuse a folder to write that cannot be one."""
    if options.out is not None:
        check_folder_for(options.out)


def check_fitted(options: Namespace) -> None:
    """Refuse a run, a text or a number of tokens that cannot be read; a patch that came with the
    package is found by its name.
    """
    options.run = folder_of(options.run)
    if not options.run.is_dir():
        require_file(options.run, CONFIG)
    check_tokens(options)
    if options.text is None:
        return
    if not options.text.is_file():
        what = "is a folder" if options.text.is_dir() else "does not exist"
        raise ValueError(f"text: expected a file; {options.text} {what}; correct the path")
    try:
        options.text.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: expected UTF-8; got an invalid byte at {error.start}; convert the file"
        ) from error


def check_tokens(options: Namespace) -> None:
    """Refuse a number of tokens below 1."""
    if options.tokens < 1:
        raise ValueError(f"tokens: expected at least 1; got {options.tokens}")
