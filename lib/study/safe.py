"""HTML without scripts: what a page of ours may hold, whatever names, notes and files its data came with.

What is not on these lists is shown as text (tags) or left out (attributes, comments), so nothing that data bring can
run, load or send. POLICY has the browser refuse the same, should something slip through.
"""

import html
import re
from html.parser import HTMLParser

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TAGS = (
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6"
)
TAGS += " hr i img kbd li mark ol p pre q s samp small span strong style sub summary sup table tbody td tfoot th thead"
TAGS += " tr u ul var math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup"
TAGS = frozenset(f"{TAGS} msup mtable mtd mtext mtr munder munderover".split())
ATTRIBUTES = "alt class colspan columnalign columnspacing display displaystyle fence form height id lang largeop"
ATTRIBUTES += " linethickness lspace mathvariant maxsize minsize movablelimits notation open rowspacing rowspan rspace"
ATTRIBUTES = frozenset(f"{ATTRIBUTES} scope scriptlevel separator start stretchy title type width xmlns".split())
VOID = {"br", "col", "hr", "img"}
LINK = re.compile(r"(https?|mailto):|[^:]*$|[^:/?#]*[/?#]", re.I)  # no scheme but these
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[\w+/=]*$")
LOADS = re.compile(r"<|url\s*\(|@import|expression\s*\(|\\", re.I)  # in a style sheet; a backslash can spell the others


class Harmless(HTMLParser):
    """Writes a page's HTML anew from what it was read as: every tag and attribute by the lists, all text escaped."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.in_style = [], False

    def handle_starttag(self, tag, attributes):
        tag = tag.split(":")[-1]  # MathML may come with a prefix, which a browser would not know
        if tag not in TAGS:
            self.handle_data(self.get_starttag_text())
            return
        self.in_style = tag == "style"
        kept = "".join(f' {name}="{html.escape(value or "")}"' for name, value in attributes if fine(name, value or ""))
        self.parts.append(f"<{tag}{kept}>")

    def handle_endtag(self, tag):
        tag = tag.split(":")[-1]
        self.in_style = False
        if tag in TAGS - VOID:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data):
        if not self.in_style:
            self.parts.append(html.escape(data, quote=False))
        elif not LOADS.search(data):
            self.parts.append(data)


def fine(name, value):
    """True if an attribute may stay: one of ATTRIBUTES, a link without a script, a picture that is in the page."""
    packed = re.sub(r"[\x00-\x20]", "", value)  # which browsers leave out of a scheme
    return name in ATTRIBUTES or (name == "href" and LINK.match(packed)) or (name == "src" and PICTURE.match(packed))


def harmless(text):
    """HTML of the body of a page, from anywhere, as HTML in which nothing runs."""
    reader = Harmless()
    reader.feed(text)
    reader.close()
    return "".join(reader.parts)
