use super::*;
use crate::processor::{ContentPart, Role};
use std::collections::BTreeSet;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/dataset")
        .join(name)
}

fn written(name: &str, content: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    let png = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/processor/images/rgb.png");
    std::fs::copy(png, dir.path().join("a.png")).unwrap();
    (dir, path)
}

fn message_of(content: &str) -> String {
    let (_dir, path) = written("data.jsonl", content);
    open_samples(&path).unwrap_err().to_string()
}

const COLOURS: [[u8; 3]; 4] = [[255, 0, 0], [0, 128, 0], [0, 0, 255], [255, 255, 255]];

#[test]
fn parquet_of_both_compressions_gives_every_question() {
    for file in ["zstd_dictionary.parquet", "snappy_plain.parquet"] {
        let questions = open_questions(&data(file)).unwrap();
        assert_eq!(questions.len(), 40);
        for (i, q) in questions.iter().enumerate() {
            assert_eq!(q.id, format!("q{i}"));
            assert_eq!(q.question, format!("Which colour is number {i}?"));
            assert_eq!(q.answers, [["red", "green", "blue", "white"][i % 4]]);
            assert_eq!(q.category.as_deref(), (i % 2 == 0).then_some("colour"));
            assert_eq!(q.images[0].load().unwrap().data[..3], COLOURS[i % 4]);
        }
    }
}

#[test]
fn parquet_conversations_keep_their_lists_of_images() {
    let set = open_samples(&data("conversations.parquet")).unwrap();
    let [two, none] = set.samples() else {
        panic!("two samples expected");
    };
    assert_eq!((two.images().len(), none.images().len()), (2, 0));
    let text = ContentPart::Text("Same?".into());
    assert_eq!(
        two.messages()[0].content,
        [ContentPart::Image, ContentPart::Image, text]
    );
    assert_eq!(two.images()[1].load().unwrap().data[..3], COLOURS[1]);
    assert_eq!(none.messages()[1].plain_text(), "Hi");
}

#[test]
fn tsv_follows_references_and_spells_options() {
    let questions = open_questions(&data("choices.tsv")).unwrap();
    assert_eq!(questions[0].id, "10");
    assert!(
        questions[0]
            .question
            .starts_with("Question: Which \"colour\"?\nOptions:\nA. red\nB. ")
    );
    assert!(
        questions[1]
            .question
            .starts_with("Hint: look\nQuestion: Two lines\nand a tab\there?")
    );
    assert_eq!(questions[1].answers, ["B"]);
    assert_eq!(questions[1].category, None);
    for question in &questions {
        assert_eq!(question.images[0].load().unwrap().data[..3], COLOURS[0]);
    }
}

#[test]
fn tsv_reference_to_nothing_is_an_error() {
    let (_dir, path) = written("t.tsv", "index\timage\tquestion\n1\t7\tWhat?\n");
    let message = open_questions(&path).unwrap_err().to_string();
    assert!(
        message.contains("row 1") && message.contains('7'),
        "{message}"
    );
}

#[test]
fn folder_reads_images_from_the_archive() {
    let set = open_samples(&data("folder")).unwrap();
    assert_eq!(set.len(), 12);
    for (i, sample) in set.samples().iter().enumerate() {
        assert_eq!(sample.id, format!("s{i}"));
        assert_eq!(sample.messages()[0].n_images(), 1);
        assert_eq!(sample.messages()[1].role, Role::Assistant);
        assert_eq!(sample.images()[0].load().unwrap().data[..3], COLOURS[i % 4]);
    }
    let questions = open_questions(&data("folder")).unwrap();
    assert_eq!(questions[3].question, "Which colour is number 3?");
    assert_eq!(questions[3].answers, ["white"]);
}

#[test]
fn choices_are_repeatable_distinct_and_nested() {
    let set = open_samples(&data("folder")).unwrap();
    let ids = |n, seed| -> BTreeSet<String> {
        let chosen = set.choose(n, seed).unwrap();
        chosen.iter().map(|s| s.id.clone()).collect()
    };
    assert_eq!(ids(5, 1), ids(5, 1));
    assert_ne!(ids(5, 1), ids(5, 2));
    assert_eq!(ids(5, 1).len(), 5);
    assert!(ids(5, 1).is_subset(&ids(9, 1)));
    assert_eq!(ids(12, 3).len(), 12);
    assert!(set.choose(13, 0).is_err());
    assert!(set.choose(0, 0).is_err());
}

#[test]
fn chat_messages_name_images_in_every_common_way() {
    let png = std::fs::read(data("../processor/images/rgb.png")).unwrap();
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, png);
    let parts = [
        r#"{"type": "image", "image": "a.png"}"#.to_owned(),
        r#"{"type": "image_url", "image_url": {"url": "a.png"}}"#.to_owned(),
        r#"{"type": "image_url", "image_url": "a.png"}"#.to_owned(),
        r#"{"type": "image", "path": "a.png"}"#.to_owned(),
        r#"{"image": "a.png"}"#.to_owned(),
        format!(
            r#"{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,{base64}"}}}}"#
        ),
    ];
    for part in parts {
        let row = format!(
            r#"{{"messages": [{{"role": "system", "content": "Be brief."}},
            {{"role": "user", "content": [{part}, {{"type": "text", "text": "Hm?"}}]}},
            {{"role": "assistant", "content": "Yes."}}]}}"#
        );
        let (_dir, path) = written("data.jsonl", &row.replace('\n', " "));
        let set = open_samples(&path).unwrap();
        let sample = &set.samples()[0];
        assert_eq!(sample.messages()[1].n_images(), 1, "{part}");
        assert_eq!(sample.images()[0].load().unwrap().width, 11);
        assert_eq!(sample.messages()[0].role, Role::System);
    }
}

#[test]
fn rows_that_contradict_themselves_name_file_and_line() {
    let human = |image: &str, text: &str| {
        format!("{{{image}\"conversations\": [{{\"from\": \"human\", \"value\": \"{text}\"}}]}}\n")
    };
    let good = human("", "Hello");
    let cases = [
        (human("", "<image>\\nWhat?"), "1 image places"),
        (human("\"image\": \"a.png\", ", "What?"), "0 image places"),
        (human("\"image\": \"b.png\", ", "<image>"), "b.png"),
        (human("\"image\": \"../a.png\", ", "<image>"), ".."),
        (
            human("\"image\": \"/etc/hosts\", ", "<image>"),
            "/etc/hosts",
        ),
        (
            human("\"image\": \"C:\\\\a.png\", ", "<image>"),
            "relative name",
        ),
        (
            human("\"image\": \"https://a/b.png\", ", "<image>"),
            "not downloaded",
        ),
        (human("\"image\": 3, ", "<image>"), "a name or list"),
        ("{\"caption\": \"x\"}\n".into(), "none of `conversations`"),
        ("{\"text\": \"\"}\n".into(), "text: it is empty"),
        ("{\"text\": 3}\n".into(), "text: a text expected"),
        (
            "{\"text\": \"x\", \"image\": \"a.png\"}\n".into(),
            "no place for the row's image",
        ),
        ("{\"conversations\": []}\n".into(), "at least one message"),
        ("{\"conversations\": [1]}\n".into(), "turns"),
        (
            "{\"messages\": [{\"role\": \"tool\", \"content\": \"\"}]}\n".into(),
            "tool",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": 1}]}\n".into(),
            "content",
        ),
        ("not json\n".into(), "JSON object"),
        ("{\"question\": \"a\", \"answer\": {}}\n".into(), "answer"),
    ];
    for (row, expected) in cases {
        let message = message_of(&format!("{good}\n{row}"));
        assert!(message.contains("data.jsonl"), "{message}");
        assert!(message.contains("line 3"), "{message}");
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn empty_and_unknown_data_are_errors() {
    assert!(message_of("\n\n").contains("empty"));
    let (dir, path) = written("data.arrow", "x");
    assert!(
        open_samples(&path)
            .unwrap_err()
            .to_string()
            .contains("arrow")
    );
    assert!(
        open_samples(dir.path())
            .unwrap_err()
            .to_string()
            .contains("samples.jsonl")
    );
    assert!(open_samples(&dir.path().join("absent.jsonl")).is_err());
}

#[test]
fn an_image_that_is_none_names_its_sample_file() {
    let row =
        r#"{"image": "data.jsonl", "conversations": [{"from": "human", "value": "<image>"}]}"#;
    let (_dir, path) = written("data.jsonl", row);
    let set = open_samples(&path).unwrap();
    let message = set.samples()[0].images()[0].load().unwrap_err().to_string();
    assert!(
        message.contains("data.jsonl") && message.contains("not an image"),
        "{message}"
    );
}

#[test]
fn a_json_array_and_text_only_rows_are_read() {
    let row = r#"{"id": 5, "question": "2+2?", "answers": ["4", "four"]}"#;
    let (_dir, path) = written("data.json", &format!("[{row},\n{row}]"));
    let questions = open_questions(&path).unwrap();
    assert_eq!(questions.len(), 2);
    assert_eq!(questions[1].id, "5");
    assert_eq!(questions[1].answers, ["4", "four"]);
    assert!(questions[1].images.is_empty());
}

#[test]
fn raw_text_stands_beside_conversations_and_apart_from_questions() {
    let rows = "{\"id\": 3, \"text\": \" a\\n\"}\n\n{\"text\": \"b\", \"images\": []}\n";
    let chat = "{\"text\": \"c\", \"question\": \"Hm?\"}\n";
    let (_dir, path) = written("data.jsonl", rows);
    let Rows::Texts(texts) = open_rows(&path).unwrap() else {
        panic!("texts expected");
    };
    assert_eq!(
        (texts[0].id.as_str(), texts[0].text.as_str()),
        ("3", " a\n")
    );
    assert!(texts[1].origin.ends_with("line 3"), "{}", texts[1].origin);
    assert!(open_questions(&path).is_err());

    let (_dir, path) = written("data.jsonl", &format!("{rows}{chat}"));
    let set = open_samples(&path).unwrap();
    let kinds = set.samples().iter().map(|s| s.messages().len());
    assert_eq!(kinds.collect::<Vec<_>>(), [0, 0, 1]);
    let message = open_rows(&path).unwrap_err().to_string();
    assert!(
        message.contains("line 4") && message.contains("one kind"),
        "{message}"
    );
}

#[test]
fn damaged_parquet_and_zip_files_never_panic() {
    for (name, as_name) in [
        ("zstd_dictionary.parquet", "d.parquet"),
        ("conversations.parquet", "d.parquet"),
        ("folder/images.zip", "images.zip"),
    ] {
        let bytes = std::fs::read(data(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(data("folder/samples.jsonl"), dir.path().join("s.jsonl")).unwrap();
        let path = dir.path().join(as_name);
        let target = if as_name == "images.zip" {
            dir.path().join("s.jsonl")
        } else {
            path.clone()
        };
        for cut in [0, 3, bytes.len() / 3, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(open_samples(&target).is_err(), "{name} cut at {cut}");
        }
        for at in (0..bytes.len()).step_by(bytes.len() / 60 + 1) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x5A;
            std::fs::write(&path, &flipped).unwrap();
            if let Ok(set) = open_samples(&target) {
                assert!(!set.is_empty());
            }
        }
    }
}

#[test]
fn chartqas_own_files_are_rows_of_its_table() {
    let human = r#"[{"imgname": "a.png", "query": "How many bars?", "label": "14"}]"#;
    let (dir, _) = written("test_human.json", human);
    let augmented = r#"[{"imgname": "a.png", "query": "What is the peak?", "label": "0.57"},
        {"imgname": "a.png", "query": "Which is the largest?", "label": "Italy"}]"#;
    std::fs::write(dir.path().join("test_augmented.json"), augmented).unwrap();
    std::fs::create_dir(dir.path().join("png")).unwrap();
    std::fs::rename(dir.path().join("a.png"), dir.path().join("png/a.png")).unwrap();
    let rows = read_rows(dir.path()).unwrap();
    let rows: Vec<Row> = rows.collect::<Result<_>>().unwrap();
    let kinds = rows.iter().map(|row| row.values()["type"].clone());
    let kinds: Vec<Value> = kinds.collect();
    assert_eq!(kinds, ["test_human", "test_augmented", "test_augmented"]);
    let question = rows.into_iter().next().unwrap().into_question().unwrap();
    assert_eq!(question.question, "How many bars?");
    assert_eq!(question.answers, ["14"]);
    assert!(question.images[0].load().is_ok());
    let outside = r#"[{"imgname": "../../a.png", "query": "q", "label": "l"}]"#;
    std::fs::write(dir.path().join("test_human.json"), outside).unwrap();
    assert!(open_questions(dir.path()).is_err());
}
