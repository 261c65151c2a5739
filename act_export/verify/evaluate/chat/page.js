"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const key = `act-export side by side ${data.key}`;
  const sides = ["A", "B"];
  const winners = ["model_a", "tie", "model_b"];
  let state = { winners: {}, revealed: false };
  try {
    state = JSON.parse(localStorage.getItem(key)) ?? state;
  } catch { /* nothing is kept where the browser doesn't let pages keep anything */ }

  const keep = () => {
    try {
      localStorage.setItem(key, JSON.stringify(state));
    } catch { /* the same */ }
  };
  const element = (name, className, text) => {
    const made = document.createElement(name);
    made.className = className;
    made.textContent = text ?? "";
    return made;
  };
  const count = (number, one, more) => `${number} ${number === 1 ? one : more}`;

  const answer = (card, side, turn) => {
    const made = element("div", "answer");
    const heading = element("h3", "side");
    heading.dataset.model = card.models[side];
    heading.dataset.side = sides[side];
    const text = card.answers[side][turn];
    made.append(heading, element("p", text ? "text" : "empty", text || "(nothing)"));
    return made;
  };

  const build = (card, number) => {
    const made = element("section", "card");
    made.append(element("h2", "", `Question ${card.id}${card.category ? `, ${card.category}` : ""}`));
    card.turns.forEach((text, turn) => {
      const pair = element("div", "pair");
      pair.append(answer(card, 0, turn), answer(card, 1, turn));
      made.append(element("p", "text asked", text), pair);
    });
    const choices = element("div", "choices");
    choices.setAttribute("role", "group");
    choices.setAttribute("aria-label", `Your choice for question ${card.id}`);
    ["A is better", "Tie", "B is better"].forEach((text, place) => {
      const button = element("button", "", text);
      button.type = "button";
      button.dataset.winner = winners[place];
      button.addEventListener("click", () => {
        if (state.winners[number] === winners[place]) delete state.winners[number];
        else state.winners[number] = winners[place];
        keep();
        show();
      });
      choices.append(button);
    });
    made.append(choices);
    return made;
  };

  const counts = () => {
    const chosen = Object.entries(state.winners).map(
      ([number, winner]) => winner !== "tie" && data.cards[number].models[winners.indexOf(winner) / 2],
    );
    const times = (model) => chosen.filter((each) => each === model).length;
    return [
      [`${data.calibration} is better`, times(data.calibration)],
      ["plain is better", times("plain")],
      ["Tie", times(false)],
      ["Not chosen", data.cards.length - chosen.length],
      ["The same text, not shown", data.same],
    ];
  };

  const show = () => {
    document.querySelectorAll(".card").forEach((card, number) => {
      for (const button of card.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(state.winners[number] === button.dataset.winner));
        button.disabled = state.revealed;
      }
    });
    for (const heading of document.querySelectorAll(".side")) {
      heading.textContent = heading.dataset.side + (state.revealed ? `: ${heading.dataset.model}` : "");
    }
    document.getElementById("result").hidden = !state.revealed;
    const rows = state.revealed ? counts() : [];
    document.getElementById("counts").replaceChildren(
      ...rows.flatMap(([name, number]) => [element("dt", "", name), element("dd", "", String(number))]),
    );
    document.getElementById("reveal").disabled = state.revealed;
    document.getElementById("done").textContent = `${Object.keys(state.winners).length} of ${data.cards.length} chosen`;
  };

  document.getElementById("reveal").addEventListener("click", () => {
    if (!confirm("Show which model is which? Choosing ends with that.")) return;
    state.revealed = true;
    keep();
    show();
    document.getElementById("result").focus();
  });
  document.getElementById("again").addEventListener("click", () => {
    if (!confirm("Forget all choices?")) return;
    state = { winners: {}, revealed: false };
    keep();
    show();
    scrollTo(0, 0);
  });
  document.getElementById("download").addEventListener("click", () => {
    const choices = Object.entries(state.winners).map(([number, winner]) => {
      const { id, models } = data.cards[number];
      return { question_id: id, model_a: models[0], model_b: models[1], winner };
    });
    const document_ = { format: "act-export choices", version: 1, key: data.key, revealed: state.revealed, choices };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(document_, null, 1)], { type: "application/json" }));
    link.download = "choices.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  if (data.same) {
    document.getElementById("same").textContent =
      `${count(data.same, "question is", "questions are")} left out, where both answers are the same to the letter.`;
  }
  document.getElementById("cards").append(...data.cards.map(build));
  show();
  document.documentElement.dataset.ready = "";
})();
