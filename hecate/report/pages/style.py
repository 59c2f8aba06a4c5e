"""The style sheet of a report, light and dark, from a phone's width up."""

_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#666666")
_DARK = ("#4da3e0", "#ff8c42", "#2fd3a0", "#e79ac5", "#f0c541", "#9ad4f7", "#b79be0", "#aaaaaa")
"""of lines and areas, by their numbers; after Okabe and Ito, so that the colour-blind can tell them apart"""


def _colours(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


STYLE = (
    f":root{{color-scheme:light dark;--text:#1b1f24;--dim:#5c6570;--page:#f6f7f9;--card:#fff;--edge:#d9dee4;{_colours(_LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{--text:#e6e9ed;--dim:#9aa4af;--page:#14171b;--card:#1d2127;--edge:#363d46;{_colours(_DARK)}}}}}"
    + "".join(f".c{number}{{--own:var(--c{number})}}" for number in range(len(_LIGHT)))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1400px;margin:0 auto;padding:16px;columns:330px;column-gap:12px}
header{column-span:all}
h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:.2em 0 .4em;break-after:avoid}
h3{font-size:.95rem;margin:0 0 .3em}
p{margin:.3em 0;overflow-wrap:anywhere}
.dim,figcaption{color:var(--dim);font-size:.9rem}
.tiles{display:grid;gap:12px;margin:8px 0 12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.tile,figure,.table{break-inside:avoid;min-width:0}
.tile,figure,.table{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:10px 12px;margin:0 0 12px}
.tile{margin:0}
.tile b{display:block;font-size:1.1rem;overflow-wrap:anywhere}
.tile span{color:var(--dim);font-size:.85rem}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:3px 10px 3px 0;vertical-align:top;overflow-wrap:anywhere}
th{color:var(--dim);font-weight:600;overflow-wrap:normal}
.chart{display:block;width:100%;height:auto}
.chart text{fill:var(--dim);font:11px system-ui,sans-serif}
.grid{stroke:var(--edge);stroke-width:1}
.mark{stroke:var(--dim);stroke-width:1;stroke-dasharray:2 3}
.line{fill:none;stroke:var(--own);stroke-width:1.8;stroke-linejoin:round}
.dot,.area,.bar{fill:var(--own)}
.area{opacity:.85}
.goal{stroke:var(--text);stroke-width:2}
.cells{image-rendering:pixelated}
.answers{column-span:all}
.answers .table{max-height:260px;overflow:auto}
.answers table{min-width:700px}
.answers td{white-space:pre-wrap}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:.3em 0}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;background:var(--own)}
"""
)
