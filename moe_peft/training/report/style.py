"""The style of a report's page, light and dark, with nothing from outside."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--text:#1d2126;--soft:#5d6670;--line:#dfe1dd;--accent:#2257c9;
--good:#1a7a45;--bad:#c02f2f;--warn:#9a6200;--over:#c4401c;--under:#2a6fb5;
--c0:#2868d8;--c1:#d9730d;--c2:#1f9254;--c3:#c43d7c;--c4:#7a52c7;--c5:#0e93a3;--c6:#a9791a;--c7:#d0403a;--c8:#5a7d1c;
--c9:#6b7280}
@media (prefers-color-scheme:dark){:root{--page:#12151a;--card:#1a1f26;--text:#e6e8ea;--soft:#9aa4af;--line:#2d343d;
--accent:#85abff;--good:#57c98a;--bad:#ff7d75;--warn:#e8b04a;--over:#f0693e;--under:#4f9be8;
--c0:#6ea2ff;--c1:#ff9a45;--c2:#4cc98a;--c3:#f27fb4;--c4:#b094f5;--c5:#3fc7d6;--c6:#dcb04a;--c7:#ff7b73;--c8:#a3c94f;
--c9:#a5adb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",sans-serif}
.page{max-width:1240px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px;letter-spacing:-.005em}
h3{font-size:15px;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:0 0 10px}
a{color:var(--accent)}
.soft,.scale,figcaption{color:var(--soft)}
nav{margin:14px 0 0;display:flex;flex-wrap:wrap;gap:6px 16px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0;padding:0}
.facts div,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.facts dt{color:var(--soft);font-size:13px}
.facts dd{margin:2px 0 0;font-size:22px;font-weight:600;letter-spacing:-.01em}
.facts small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:16px}
.card{margin:0;min-width:0}
.wide{grid-column:1/-1}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px}
figure{margin:0}
figcaption{font-size:13px;margin:0 0 6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{text-align:left;color:var(--soft);font-size:13px;padding:0 0 6px}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;
font-variant-numeric:tabular-nums}
thead th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
tbody th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
.numbers td,.numbers thead th:not(:first-child){text-align:right;white-space:nowrap}
.jobs td,.jobs th{vertical-align:middle}
.tight{white-space:nowrap}
.name{display:inline-block;overflow-wrap:anywhere;min-width:7em}
.state{display:inline-block;border-radius:99px;padding:1px 10px;font-size:13px;border:1px solid currentColor;
white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}.now{color:var(--accent)}
.reason{display:block;font-size:13px;color:var(--soft);overflow-wrap:anywhere;max-width:34em}
.bar{display:block;height:5px;width:90px;border-radius:3px;background:var(--line);margin-top:4px;overflow:hidden}
.bar span{display:block;height:100%;background:var(--accent)}
ul.notes{margin:0;padding-left:20px}
ul.notes li{overflow-wrap:anywhere}
details{margin-top:10px}
summary{cursor:pointer;color:var(--soft);font-size:13px}
details>:not(summary){margin-top:8px}
pre{overflow-x:auto;font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,"Liberation Mono",monospace;margin:0;padding:12px;
background:var(--page);border-radius:8px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,"Liberation Mono",monospace}
svg{display:block}
svg text{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",sans-serif;
fill:var(--soft);font-variant-numeric:tabular-nums}
.chart{width:100%;height:auto}
.chart .grid{stroke:var(--line)}
.chart .axis{stroke:var(--soft)}
.series,.spark g,.legend li{--own:var(--text)}
.c0{--own:var(--c0)!important}.c1{--own:var(--c1)!important}.c2{--own:var(--c2)!important}
.c3{--own:var(--c3)!important}.c4{--own:var(--c4)!important}.c5{--own:var(--c5)!important}
.c6{--own:var(--c6)!important}.c7{--own:var(--c7)!important}.c8{--own:var(--c8)!important}
.c9{--own:var(--c9)!important}
.line,.faint,.dotted{fill:none;stroke:var(--own);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1;opacity:.3}
.dotted{stroke-width:1.2;stroke-dasharray:1 4}
.series circle{fill:var(--own);stroke:var(--card);stroke-width:1.2}
.series{transition:opacity .12s}
.series:hover .line{stroke-width:3.2}
.cross{stroke:var(--bad);stroke-width:1.6;fill:none}
.legend{list-style:none;margin:8px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px}
.legend li{display:flex;align-items:center;gap:6px;cursor:default;overflow-wrap:anywhere}
.key{width:24px;height:10px;flex:none}
.spark{width:90px;height:22px}
.heat{width:100%;height:auto}
.over{fill:var(--over)}.under{fill:var(--under)}.dead{fill:var(--under);stroke:var(--text);stroke-width:1.4}
svg.heat text{font-size:10.5px}
svg.heat text.number{fill:var(--text)}
svg.heat text.dark{fill:#fff}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;vertical-align:-1px;border:1px solid var(--line);
margin-left:12px}
.swatch:first-child{margin-left:0}
.swatch.over{background:var(--over)}.swatch.under{background:var(--under);opacity:.6}
.swatch.dead{background:var(--under);border-color:var(--text)}
.scale{font-size:13px;margin:12px 0}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media print{.card,.facts div{break-inside:avoid}body{background:#fff}}
"""
