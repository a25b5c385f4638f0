"""Tables as text: Markdown, so that they can go into a document as they are."""


def table(heads, rows):
    """A Markdown table with columns of even width; numbers stand to the right."""
    cells = [[show(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [heads, *cells]) for column in range(len(heads))]
    right = [all(not isinstance(row[column], str) for row in rows) for column in range(len(heads))]

    def line(row):
        columns = zip(row, widths, right)
        padded = [cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in columns]
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * (width + 1) + (":" if to_right else "-") for width, to_right in zip(widths, right)]
    return "\n".join([line(heads), "|" + "|".join(rules) + "|", *[line(row) for row in cells]])


def show(cell):
    """A cell as text; what is not known is a dash."""
    return "-" if cell is None else str(cell)


def mebibytes(count):
    """Bytes as MiB with one digit."""
    return None if count is None else round(count / (1 << 20), 1)
