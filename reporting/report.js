"use strict";
{
  const form = document.querySelector("form");
  const cards = [...document.querySelectorAll("article")];

  // Show the images that match, with the chosen map over their frames.
  function choose() {
    const { kind, group, name, map } = Object.fromEntries(new FormData(form));
    for (const card of cards) {
      const own = card.dataset;
      const named = own.name.toLowerCase().includes(name.toLowerCase());
      card.hidden = (kind && own.kind !== kind) || (group && own.group !== group) || !named;
      const overlay = card.querySelector(".overlay");
      overlay.hidden = !map;
      if (map) overlay.src = card.querySelector(`[data-part="${CSS.escape(map)}"]`).src;
    }
    form.elements.count.value = `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown`;
  }

  form.addEventListener("input", choose);
  form.hidden = false;
  choose();
}
