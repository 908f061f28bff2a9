//! Relaxed accuracy, ChartQA's metric: numbers within 5 %, everything else to the letter.

use super::python::float;

/// Largest relative difference that still counts.
const MAX_RELATIVE_CHANGE: f64 = 0.05;

/// Whether a prediction is the right answer: a number of it within 5 % where both are numbers and
/// the right one is not zero, else the same text but for case. A percent sign divides by 100.
///
/// Source: arXiv:2203.10244 §5.1; lmms-eval 0.7.3 `tasks/chartqa/utils.py` `relaxed_correctness`,
/// VLMEvalKit `dataset/utils/vqa_eval.py`. Differs: no.
pub(super) fn is_correct(prediction: &str, answer: &str) -> bool {
    match (number(prediction), number(answer)) {
        (Some(found), Some(expected)) if expected != 0.0 => {
            (found - expected).abs() / expected.abs() <= MAX_RELATIVE_CHANGE
        }
        _ => prediction.to_lowercase() == answer.to_lowercase(),
    }
}

fn number(text: &str) -> Option<f64> {
    match text.ends_with('%') {
        true => Some(float(text.trim_end_matches('%'))? / 100.0),
        false => float(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_may_be_off_by_a_twentieth() {
        for (prediction, answer, expected) in [
            ("105", "100", true),
            ("105.01", "100", false),
            ("-100", "100", false),
            ("50%", "0.5", true),
            ("50 %%", "0.5", true),
            ("1_000", "1000", true),
            ("Yes", "yes", true),
            ("yes.", "yes", false),
            // Zero has no relative difference.
            ("0.0", "0", false),
            ("0", "0", true),
            // NaN is near nothing, infinity not even itself.
            ("nan", "nan", false),
            ("inf", "inf", false),
            ("%", "%", true),
        ] {
            assert_eq!(
                is_correct(prediction, answer),
                expected,
                "{prediction} {answer}"
            );
        }
    }
}
