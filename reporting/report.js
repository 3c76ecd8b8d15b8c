"use strict";
{
  const find = (selector, root = document) => root.querySelector(selector);
  const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
  const cards = findAll(".card");
  const viewer = find("#viewer");
  let shown = cards;

  // What the page shows stands in its address: filter, group, query, contours, theme, open.
  let state = new URLSearchParams(location.hash.slice(1));

  function change(key, value) {
    if (value) state.set(key, value);
    else state.delete(key);
    history.replaceState(null, "", `#${state}`);
    apply();
  }

  function apply() {
    const [filter, group, query] = ["filter", "group", "query"].map((key) => state.get(key) || "");
    const wanted = query.toLowerCase();
    for (const card of cards) {
      const { kind, group: own, name } = card.dataset;
      card.hidden = (filter && kind !== filter) || (group && own !== group) || !name.toLowerCase().includes(wanted);
    }
    shown = cards.filter((card) => !card.hidden);
    for (const button of findAll("[data-filter]")) {
      button.setAttribute("aria-pressed", button.dataset.filter === filter);
    }
    find("#group").value = group;
    if (find("#query").value !== query) find("#query").value = query;
    find("#contours").checked = state.get("contours") !== "off";
    document.body.classList.toggle("no-contours", state.get("contours") === "off");
    find("#count").textContent = `${shown.length} of ${cards.length} shown`;
    find("#none").hidden = shown.length > 0;
    if (state.has("theme")) document.documentElement.dataset.theme = state.get("theme");
    else delete document.documentElement.dataset.theme;
    const open = cards[state.get("open") - 1];
    if (open) view(open);
    else if (viewer.open) viewer.close();
  }

  // The enlarged view: input with contours, input, ground truth, maps.
  function view(card) {
    const body = find("#viewer-body");
    const frame = find(".frame", card);
    const plain = find("img", frame).cloneNode();
    body.style.setProperty("--aspect", plain.width / plain.height);
    const panels = [panel([frame.cloneNode(true)], "Contours"), panel([plain], "Input")];
    for (const part of findAll(".panel", card)) {
      panels.push(panel([part.firstElementChild.cloneNode(true)], part.textContent, part.dataset.score));
    }
    body.replaceChildren(...panels);
    for (const path of findAll("path[id]", body)) path.removeAttribute("id");
    for (const image of findAll("img", body)) image.loading = "eager";
    find("#viewer-title").textContent = card.dataset.name;
    const place = document.createElement("span");
    place.textContent = `${shown.indexOf(card) + 1} of ${shown.length}`;
    find("#viewer-line").replaceChildren(...findAll("p > *", card).map((node) => node.cloneNode(true)), place);
    if (!viewer.open) viewer.showModal();
  }

  function panel(content, title, score) {
    const box = document.createElement("div");
    const caption = document.createElement("div");
    box.className = "panel";
    caption.append(title);
    if (score) {
      const number = document.createElement("b");
      number.textContent = ` ${score}`;
      caption.append(number);
    }
    box.append(...content, caption);
    return box;
  }

  function turn(step) {
    const next = shown[shown.indexOf(cards[state.get("open") - 1]) + step];
    if (next) change("open", String(cards.indexOf(next) + 1));
  }

  function close() {
    const card = cards[state.get("open") - 1];
    change("open", "");
    if (card && !card.hidden) find(".open", card).focus();
  }

  // In the gallery the arrow keys move from image to image, up and down by a row.
  function move(event) {
    const card = event.target.closest(".card");
    const columns = getComputedStyle(find(".cards")).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const next = card && step && shown[shown.indexOf(card) + step];
    if (!next) return;
    event.preventDefault();
    find(".open", next).focus();
  }

  // Over a chart, the nearest point of a curve is named.
  function point(event) {
    const chart = event.currentTarget;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    let best = { distance: 24 };
    for (const line of findAll("polyline", chart)) {
      for (const { x, y } of line.points) {
        const distance = Math.hypot(x - at.x, y - at.y);
        if (distance < best.distance) best = { distance, x, y, name: line.dataset.name };
      }
    }
    leave(event);
    if (best.name === undefined) return;
    const plot = find(".plot", chart).getBBox();
    const x = ((best.x - plot.x) / plot.width) * chart.dataset.xLimit;
    const y = 1 - (best.y - plot.y) / plot.height;
    const cursor = find(".cursor", chart);
    cursor.removeAttribute("hidden");
    cursor.setAttribute("transform", `translate(${best.x} ${best.y})`);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.textContent = `${best.name}: ${chart.dataset.x} ${x.toFixed(3)}, ${chart.dataset.y} ${y.toFixed(3)}`;
    const spot = new DOMPoint(best.x, best.y).matrixTransform(chart.getScreenCTM());
    const box = chart.parentElement.getBoundingClientRect();
    chart.parentElement.append(tip);
    const half = tip.offsetWidth / 2;
    tip.style.left = `${Math.min(Math.max(spot.x - box.left, half), box.width - half)}px`;
    tip.style.top = `${spot.y - box.top}px`;
  }

  function leave(event) {
    find(".cursor", event.currentTarget).setAttribute("hidden", "");
    find(".tip", event.currentTarget.parentElement)?.remove();
  }

  for (const button of findAll("[data-filter]")) {
    button.addEventListener("click", () => change("filter", button.dataset.filter));
  }
  cards.forEach((card, index) => {
    find(".open", card).addEventListener("click", () => change("open", String(index + 1)));
  });
  for (const chart of findAll("[data-x-limit]")) {
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("pointerleave", leave);
  }
  find("#group").addEventListener("change", (event) => change("group", event.target.value));
  find("#query").addEventListener("input", (event) => change("query", event.target.value));
  find("#contours").addEventListener("change", (event) => change("contours", event.target.checked ? "" : "off"));
  find("#previous").addEventListener("click", () => turn(-1));
  find("#next").addEventListener("click", () => turn(1));
  find("#close").addEventListener("click", close);
  find(".cards").addEventListener("keydown", move);
  viewer.addEventListener("cancel", (event) => {
    event.preventDefault();
    close();
  });
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) close();
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  find("#theme").addEventListener("click", () => {
    const dark = state.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    change("theme", dark === "dark" ? "light" : "dark");
  });
  addEventListener("hashchange", () => {
    state = new URLSearchParams(location.hash.slice(1));
    apply();
  });
  find("#theme").hidden = find(".toolbar").hidden = false;
  if (find("#group").options.length < 2) find("#group").hidden = true;
  if (findAll("[data-filter]").length < 3) find(".filters").hidden = true;
  find("#contours").parentElement.hidden = !find(".legend .swatch");
  apply();
}
