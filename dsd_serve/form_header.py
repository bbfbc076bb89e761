"""The header of multipart forms, for both servers, the API and the page: what of it the parser of a form may see."""

from python_multipart.multipart import parse_options_header

from dsd_serve.errors import InputError


def form_header(content_type: str) -> str:
    """The Content-Type of a form with its boundary and nothing else. Raises InputError if there is no boundary.

    Some clients name a charset. Starlette would look it up, and Python keeps every unknown name for ever
    (encodings._cache); texts are read as UTF-8 in any case (RFC 7578, 5.1).
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not boundary:
        raise InputError(
            "content-type must name the boundary of the form, as multipart/form-data; boundary=...; programs that "
            "write forms, such as curl -F, set this header themselves"
        )
    quoted = boundary.replace("\\", "\\\\").replace('"', '\\"')
    return f'multipart/form-data; boundary="{quoted}"'
