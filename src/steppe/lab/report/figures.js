const dark = window.matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), title: {standoff: 12}};
  const merged = {
    font: {family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 13},
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--ink")}},
    hovermode: "closest",
    margin: {l: 60, r: 16, t: 10, b: 50},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom"},
    ...layout,
  };
  for (const key of Object.keys(merged).filter(key => /^[xy]axis\d*$/.test(key))) {
    merged[key] = {...axis, ...merged[key], title: {...axis.title, ...merged[key].title}};
  }
  return merged;
}

function draw() {
  for (const {id, data, layout} of figures) {
    Plotly.react(id, data, themed(layout), {responsive: true, displaylogo: false, displayModeBar: false});
  }
}

draw();
dark.addEventListener("change", draw);
