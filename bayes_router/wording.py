"""What the libraries of options say of a wrong one, in the words of every other message here."""

import re
from collections.abc import Iterable

from bayes_router.checks import nearest, unknown

KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list, as [a,b]",
    "Path": "a path",
}
KEY = r'(?:Parser key )?"(?P<name>[^"]+)"(?: element \d+)?: '
CLASS = r"<class '(?:\w+\.)*(?P<kind>\w+)'>"
WRONG_KIND = (
    re.compile(
        KEY + r".*Subtypes: \[(?:" + CLASS + r"|(?P<many>tuple)\[).*Given value: (?P<value>.*)"
    ),
    re.compile(KEY + r"Expected a " + CLASS + r"\.? Got value: (?P<value>.*)"),
)


def plain(message: str, options: Iterable[str] = ()) -> str:
    """The message: field, what was expected, what came, and the nearest that there is."""
    for pattern in WRONG_KIND:
        if found := pattern.search(message):
            parts = found.groupdict()
            kind = KINDS.get(parts.get("many") or parts["kind"], parts["kind"])
            return f"{parts['name']}: expected {kind}; got {parts['value'].strip()!r}"
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        option = found[1].split("=")[0]
        if not option.startswith("-"):
            return f"arguments: expected no further one; got {option!r}; --help lists them"
        return (
            f"option: expected one of this command; got {option!r}"
            f"{nearest(option, options, alike=0.3)}; --help lists them"
        )
    if found := re.match(r"argument command: invalid choice: '(.*)' \(choose from (.*)\)", message):
        return str(unknown("command", found[1], re.findall(r"[\w-]+", found[2])))
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        return f"{' and '.join(names)}: expected a value; got none; --help says what it is"
    if found := re.match(r"argument (\S+): expected (one|at least one) argument", message):
        return f"{found[1]}: expected a value; got none"
    if message.startswith('expected "command"'):
        return "command: expected one; got none; --help lists them"
    return message.replace("Parser key ", "")
