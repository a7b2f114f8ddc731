"""Stand-ins for the hub: errors by the names that its libraries use, and streamed splits that break on demand."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Response:
    """What the probe looks at in an answer of the hub."""

    def __init__(self, status):
        self.status_code = status

    def json(self):
        return {"sha": COMMIT}


class HTTPError(Exception):
    def __init__(self, status):
        super().__init__(f"{status} for the url")
        self.response = Response(status)


class ConnectError(Exception):
    """Named as in httpx."""


class ReadTimeout(Exception):
    """Named as in httpx."""


class Rows:
    """A streamed split. `breaks` maps a row number to the errors met before that row, one a try."""

    def __init__(self, rows, breaks=None, start=0):
        self.rows, self.breaks, self.start = rows, breaks or {}, start

    def __iter__(self):
        for number in range(self.start, len(self.rows)):
            if self.breaks.get(number):
                raise self.breaks[number].pop(0)
            yield self.rows[number]

    def skip(self, count):
        return Rows(self.rows, self.breaks, self.start + count)


def dialogue(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"yes, {text}"}]}


def rows(kind, count=40):
    return Rows([dialogue(f"{kind} {number}") for number in range(count)])


def texts(kind, numbers):
    return [f"User: {kind} {number}\nAssistant: yes, {kind} {number}" for number in numbers]
