//! Questions put to one model or two, portion by portion.

use super::output::{Output, metric};
use crate::Result;
use crate::cli::progress::Progress;
use crate::eval::benchmark::Asked;
use crate::eval::{
    Accuracy, AnsweredQuestion, Divergence, EvalItem, OtherAnswer, Pairs, Prediction,
    QUESTIONS_AT_ONCE, QuestionSource, Score, answer_all, encode_questions, is_right,
    score_answers,
};
use crate::model::LoadedModel;
use crate::processor::Processor;
use serde_json::{Value, json};

/// What all tasks need.
pub struct Models {
    pub processor: Processor,
    pub model: LoadedModel,
    pub reference: Option<LoadedModel>,
    pub progress: Progress,
    /// Questions and texts of all tasks.
    pub n: usize,
}

impl Models {
    /// All answers to the questions of a task, those included that `output` has already.
    pub fn answers(
        &self,
        task: &str,
        source: &QuestionSource,
        n: usize,
        output: Option<&Output>,
    ) -> Result<Vec<AnsweredQuestion>> {
        let (mut answers, mut file) = match output {
            Some(output) => {
                let (answers, file) = output.answers(task, n)?;
                (answers, Some(file))
            }
            None => (Vec::new(), None),
        };
        self.progress.step(task, answers.len(), self.n);
        let mut questions = source.questions()?.skip(answers.len()).peekable();
        while questions.peek().is_some() {
            let portion: Vec<Asked> = questions
                .by_ref()
                .take(QUESTIONS_AT_ONCE)
                .collect::<Result<_>>()?;
            let found = self.portion(task, source, &portion, answers.len())?;
            if let Some(file) = &mut file {
                file.add(&found, metric(source.benchmark, source.protocol))?;
            }
            answers.extend(found);
        }
        Ok(answers)
    }

    fn portion(
        &self,
        task: &str,
        source: &QuestionSource,
        asked: &[Asked],
        n_before: usize,
    ) -> Result<Vec<AnsweredQuestion>> {
        let items = encode_questions(asked, &self.processor)?;
        let on_token = |n_answered| {
            self.progress.step(task, n_answered, self.n);
            self.progress.go_on()
        };
        let found = answer_all(&self.model, &self.processor, &items, &on_token)?;
        let one = |(i, (asked, found)): (usize, (&Asked, &Prediction))| {
            let (benchmark, protocol) = (source.benchmark, source.protocol);
            AnsweredQuestion::new(asked, n_before + i, found, benchmark, protocol)
        };
        let mut answers: Vec<_> = asked.iter().zip(&found).enumerate().map(one).collect();
        if let Some(reference) = &self.reference {
            let others = self.others(reference, source, asked, &items)?;
            for (answer, other) in answers.iter_mut().zip(others) {
                answer.reference = Some(other);
            }
        }
        Ok(answers)
    }

    /// The reference's answers, and how far the model is from it.
    fn others(
        &self,
        reference: &LoadedModel,
        source: &QuestionSource,
        asked: &[Asked],
        items: &[EvalItem],
    ) -> Result<Vec<OtherAnswer>> {
        let found = answer_all(reference, &self.processor, items, &|_| {
            self.progress.go_on()
        })?;
        self.progress.go_on()?;
        let scored = score_answers(reference, items, None)?;
        let originals: Vec<_> = scored.into_iter().map(|(_, original)| original).collect();
        self.progress.go_on()?;
        let scored = score_answers(&self.model, items, Some(&originals))?;
        let others = asked.iter().zip(&found).zip(scored);
        Ok(others
            .map(|((asked, found), (score, _))| {
                let answer = asked.answer(&found.text);
                OtherAnswer {
                    score: asked.judge.score(&answer, source.protocol),
                    answer,
                    divergence: score.divergence.unwrap_or_default(),
                }
            })
            .collect())
    }
}

/// The rows of predictions.json.
pub fn predictions(answers: &[AnsweredQuestion]) -> Value {
    let row = |a: &AnsweredQuestion| {
        let mut row = json!({
            "id": a.id,
            "category": a.groups.first().filter(|group| !group.is_empty()),
            "answer": a.answer(),
            "expected": a.target,
            "correct": is_right(a.score),
        });
        if a.benchmark.is_some() {
            row["score"] = a.score.into();
        }
        if let Some(other) = &a.reference {
            row["reference"] = json!({
                "answer": other.answer,
                "correct": is_right(other.score),
                "score": other.score,
            });
        }
        row
    };
    answers.iter().map(row).collect()
}

/// A task's scores, and with a reference the distance from it and the questions that flipped.
pub fn summary(source: &QuestionSource, answers: &[AnsweredQuestion], seed: u64) -> Value {
    let scores: Vec<f64> = answers.iter().map(|a| a.score).collect();
    let mut score = json!(Score::of(&scores, seed));
    score["metric"] = metric(source.benchmark, source.protocol).into();
    let mut row = json!({});
    if let Some(benchmark) = source.benchmark {
        score["benchmark"] = benchmark.name().into();
        score["protocol"] = json!(source.protocol);
        let own_limit = benchmark.max_new_tokens(source.protocol);
        score["max_new_tokens"] = source.max_new_tokens.unwrap_or(own_limit).into();
        let groups = answers.iter().map(|a| (a.groups.as_slice(), a.score));
        row["groups"] = json!(Score::by_group(groups, seed));
    } else {
        let right = answers
            .iter()
            .map(|a| (a.groups.first(), is_right(a.score)));
        row["accuracy"] = json!(Accuracy::of(right.clone().map(|(_, right)| right)));
        row["by_category"] = json!(Accuracy::by_group(right));
    }
    row["score"] = score;
    let first = answers.iter().filter_map(|a| a.is_first_token_right());
    let first: Vec<f64> = first.map(|right| f64::from(u8::from(right))).collect();
    if !first.is_empty() {
        row["first_token"] = json!(Score::of(&first, seed));
    }
    let others = answers
        .iter()
        .filter_map(|a| Some((a, a.reference.as_ref()?)));
    let others: Vec<(&AnsweredQuestion, &OtherAnswer)> = others.collect();
    if others.len() == answers.len() && !others.is_empty() {
        let divergence = Divergence::total(others.iter().map(|(_, other)| other.divergence));
        row["kl_per_answer_token"] = json!(divergence.kl_per_token());
        row["same_top_percent"] = json!(divergence.same_top_percent());
        let pairs: Vec<(f64, f64)> = others
            .iter()
            .map(|(a, other)| (a.score, other.score))
            .collect();
        row["pairs"] = json!(Pairs::of(&pairs, seed));
        row["flipped"] = others
            .iter()
            .filter_map(|(a, other)| flipped(a, other))
            .collect();
    }
    row
}

fn flipped(own: &AnsweredQuestion, other: &OtherAnswer) -> Option<Value> {
    (is_right(own.score) != is_right(other.score)).then(|| {
        json!({
            "id": own.id,
            "question": own.doc.get("question"),
            "expected": own.target,
            "answer": own.answer(),
            "score": own.score,
            "reference_answer": other.answer,
            "reference_score": other.score,
        })
    })
}
