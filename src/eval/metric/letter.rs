//! Letters of multiple choice, each set with its own way to find one in an answer.

use super::Protocol;
use super::python::{strip, words};

/// What the MME-RealWorld metric takes out of an answer first. VLMEvalKit's list lacks two commas,
/// so that four of the beginnings are two that never occur.
const LMMS_EVAL_PREFIXES: [&str; 8] = [
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
];
const VLM_EVAL_KIT_PREFIXES: [&str; 6] = [
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
];
/// An answer with more words needs a capital letter.
const MAX_WORDS: usize = 10;

/// Whether the letter that an answer to MME-RealWorld gives is the right one. lmms-eval ignores
/// case and lets the right answer be part of what was found; VLMEvalKit looks between `<answer>`
/// tags and takes the letter only.
///
/// Source: lmms-eval 0.7.3 `tasks/mme_realworld/utils.py`, VLMEvalKit `dataset/image_mcq.py`
/// `MMERealWorld.evaluate`. Differs: no.
pub(super) fn mme_realworld(prediction: &str, answer: &str, protocol: Protocol) -> bool {
    match protocol {
        Protocol::LmmsEval => {
            let found = first_letter(prediction, &LMMS_EVAL_PREFIXES).to_lowercase();
            found.contains(&answer.to_lowercase())
        }
        Protocol::VlmEvalKit => {
            let inside = between_tags(prediction);
            let found = match &inside {
                Some(inside) => first_letter(inside, &VLM_EVAL_KIT_PREFIXES),
                None => first_letter(prediction, &VLM_EVAL_KIT_PREFIXES),
            };
            !found.is_empty() && found == answer
        }
    }
}

fn between_tags(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("<answer>")?;
    let (inside, _) = rest.split_once("</answer>")?;
    Some(strip(inside).to_uppercase())
}

/// The first of A to E; without one, the letter of the first of "(A)" to "(E)" that the text is a
/// part of, which an empty one is of "(A)"; else nothing.
fn first_letter(text: &str, prefixes: &[&str]) -> &'static str {
    const LETTERS: [&str; 5] = ["A", "B", "C", "D", "E"];
    const CHOICES: [&str; 5] = ["(a)", "(b)", "(c)", "(d)", "(e)"];
    let start = strip(text).to_owned();
    let text = prefixes.iter().fold(start, |text, p| text.replace(p, ""));
    if let Some(found) = text.find(['A', 'B', 'C', 'D', 'E']) {
        return LETTERS[usize::from(text.as_bytes()[found] - b'A')];
    }
    if words(&text).count() > MAX_WORDS {
        return "";
    }
    let lower = text.to_lowercase();
    let place = CHOICES.iter().position(|choice| choice.contains(&lower));
    place.map_or("", |place| LETTERS[place])
}

/// Whether an answer to ScienceQA is the right letter, alone or in capitals before a period.
///
/// Source: lmms-eval 0.7.3 `tasks/scienceqa/utils.py` `sqa_process_results`. Differs: no.
pub(super) fn scienceqa(prediction: &str, answer: &str) -> bool {
    let target = strip(answer).to_lowercase();
    let prediction = strip(prediction);
    if prediction.to_lowercase() == target {
        return true;
    }
    let mut chars = prediction.chars();
    match (chars.next(), chars.next()) {
        (Some(letter), Some('.')) if letter.is_uppercase() => {
            letter.to_lowercase().collect::<String>() == target
        }
        _ => false,
    }
}

/// Whether the first character of an answer to SEED-Bench-2-Plus is the right letter.
///
/// Source: lmms-eval 0.7.3 `tasks/seedbench_2_plus/utils.py`. Differs: no.
pub(super) fn seedbench(prediction: &str, answer: &str) -> bool {
    let first: String = strip(prediction).chars().take(1).collect();
    let lower = first.to_lowercase();
    strip(&lower) == strip(&answer.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_capital_is_taken() {
        let lmms_eval = |p, a| mme_realworld(p, a, Protocol::LmmsEval);
        let vlm_eval_kit = |p, a| mme_realworld(p, a, Protocol::VlmEvalKit);
        assert!(lmms_eval("The best answer is (C).", "C") && vlm_eval_kit("(C)", "C"));
        // "Best option:" keeps its B in VLMEvalKit.
        assert!(lmms_eval("Best option: D", "D") && vlm_eval_kit("Best option: D", "B"));
        // Nothing is part of "(A)"; a small letter of its own choice.
        assert!(lmms_eval("", "A") && lmms_eval("(d", "D") && vlm_eval_kit("e", "E"));
        assert!(lmms_eval("b", "b") && !vlm_eval_kit("b", "b"));
        let long = "one two three four five six seven eight nine ten eleven";
        assert!(!lmms_eval(long, "A") && !vlm_eval_kit(long, ""));
        assert!(lmms_eval(long, ""));
        assert!(vlm_eval_kit("A <answer> b </answer>", "B"));
        assert!(vlm_eval_kit("A </answer> <answer> b", "A"));
    }

    #[test]
    fn scienceqa_takes_a_letter_or_a_letter_and_a_period() {
        for (prediction, expected) in [
            ("b", true),
            (" B ", true),
            ("B. both", true),
            ("b. both", false),
            ("B) both", false),
            ("(B)", false),
            ("A. B", false),
            ("", false),
        ] {
            assert_eq!(scienceqa(prediction, "B"), expected, "{prediction}");
        }
    }

    #[test]
    fn seedbench_takes_the_first_character() {
        assert!(seedbench("because", "B") && seedbench(" b", " B\n"));
        assert!(!seedbench("(B)", "B") && !seedbench("", "B"));
    }
}
