//! VLMEvalKit's way to tell which option of a multiple choice an answer means.

use super::python::words;

/// An option's letter and text.
pub type Choice = (char, String);

const FAILED: &str = "Failed to obtain answer via API";
const REFUSALS: [&str; 4] = [
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
];
const MARKS: [char; 13] = [
    '.', '(', ')', '[', ']', ',', ':', ';', '!', '*', '#', '{', '}',
];
/// A letter counts among so many words at the end.
const LAST_WORDS: usize = 5;

/// The letter of the option that an answer means; Z is none of them.
///
/// Source: VLMEvalKit `utils/matching_util.py` `can_infer`, under `exact_matching`, which counts
/// what stays open as Z. Differs: no.
pub(super) fn meant(prediction: &str, choices: &[Choice]) -> char {
    by_letter(prediction, choices)
        .or_else(|| by_text(prediction, choices))
        .unwrap_or('Z')
}

/// The only letter that stands alone, if it is near the end.
fn by_letter(prediction: &str, choices: &[Choice]) -> Option<char> {
    if prediction.contains(FAILED) {
        return None;
    }
    if REFUSALS.iter().any(|refusal| prediction.contains(refusal)) {
        return Some('Z');
    }
    let plain = prediction.replace(MARKS, " ");
    let words: Vec<&str> = words(&plain).collect();
    let place = |letter: char| {
        let is_it = |word: &&str| word.chars().eq([letter]);
        words.iter().position(is_it)
    };
    let mut found = choices
        .iter()
        .filter_map(|(letter, _)| Some((*letter, place(*letter)?)));
    match (found.next(), found.next()) {
        (Some((letter, at)), None) => (at + LAST_WORDS > words.len()).then_some(letter),
        (None, _) => place('Z').map(|_| 'Z'),
        _ => None,
    }
}

/// The only option whose text is in the answer, unless that is twice as long as all of them.
fn by_text(prediction: &str, choices: &[Choice]) -> Option<char> {
    let prediction = prediction.to_lowercase();
    let n_chars: usize = choices.iter().map(|(_, text)| text.chars().count()).sum();
    if prediction.chars().count() > 2 * n_chars {
        return None;
    }
    let is_in = |(_, text): &&Choice| prediction.contains(&text.to_lowercase());
    let mut found = choices.iter().filter(is_in);
    match (found.next(), found.next()) {
        (Some((letter, _)), None) => Some(*letter),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_by_letter_then_by_text() {
        let choices = [('A', "a cat".to_owned()), ('B', "Two dogs".to_owned())];
        for (prediction, expected) in [
            ("B", 'B'),
            ("The answer is (B).", 'B'),
            ("A or B", 'Z'),
            // Too far from the end, and no text to go by.
            ("B it is, I think so now", 'Z'),
            ("two dogs", 'B'),
            ("a cat and two dogs", 'Z'),
            ("Z", 'Z'),
            ("Cannot determine the answer B", 'Z'),
            ("Failed to obtain answer via API B", 'Z'),
            ("I see two dogs, and much else besides", 'Z'),
        ] {
            assert_eq!(meant(prediction, &choices), expected, "{prediction}");
        }
    }
}
