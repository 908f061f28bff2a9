//! The whole processor against transformers: `testdata/processor/model` is a checkpoint folder
//! without weights, `conversations.json` what transformers makes of it.

use super::*;
use crate::families::open_processor;
use serde::Deserialize;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/processor")
        .join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

#[derive(Deserialize)]
struct Conversation {
    template: String,
    messages: Value,
    grids: Vec<[usize; 3]>,
    add_generation_prompt: bool,
    rendered: String,
    input_ids: Vec<u32>,
}

fn open_with_template(template: &str) -> Processor {
    let mut processor = open_processor(&data("model")).unwrap();
    let text = std::fs::read_to_string(data(template)).unwrap();
    processor.template = ChatTemplate::new(template, &text, Map::new()).unwrap();
    processor
}

fn messages_of(value: &Value) -> Vec<Message> {
    let part = |p: &Value| match p["text"].as_str() {
        Some(text) => ContentPart::Text(text.to_owned()),
        None => ContentPart::Image,
    };
    let message = |m: &Value| Message {
        role: match m["role"].as_str() {
            Some("system") => Role::System,
            Some("assistant") => Role::Assistant,
            _ => Role::User,
        },
        content: m["content"].as_array().unwrap().iter().map(part).collect(),
    };
    value.as_array().unwrap().iter().map(message).collect()
}

fn blank(grid_thw: [usize; 3]) -> Arc<VisionInput> {
    let rows = grid_thw.iter().product();
    Arc::new(VisionInput {
        patches: crate::Matrix::zeros(rows, 1),
        grid_thw,
        n_tokens: rows / 4,
        tiling: None,
    })
}

#[test]
fn conversations_equal_transformers() {
    let cases: Vec<Conversation> =
        serde_json::from_value(json("conversations.json")["cases"].clone()).unwrap();
    assert!(cases.len() >= 8);
    for case in cases {
        let processor = open_with_template(&case.template);
        let messages = messages_of(&case.messages);
        let rendered = processor.render_chat(&messages, case.add_generation_prompt);
        assert_eq!(rendered.unwrap(), case.rendered);
        let images: Vec<_> = case.grids.iter().map(|g| blank(*g)).collect();
        let input = processor
            .encode(&messages, &images, case.add_generation_prompt)
            .unwrap();
        assert_eq!(input.input_ids, case.input_ids, "{}", case.rendered);
        assert_eq!(input.classes.len(), input.input_ids.len());
    }
}

#[test]
fn token_ids_and_text_equal_transformers() {
    let processor = open_processor(&data("model")).unwrap();
    let golden = json("tokens.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 30);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(processor.encode_text(text).unwrap(), ids, "{text:?}");
        let decoded = processor.decode(&ids).unwrap();
        assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{text:?}");
    }
}

#[test]
fn classes_cover_each_text_and_the_end_of_the_answer() {
    let processor = open_with_template("qwen2_vl.jinja");
    let messages = [
        Message {
            role: Role::User,
            content: vec![
                ContentPart::Image,
                ContentPart::Text("What is this?".into()),
            ],
        },
        Message::text(Role::Assistant, "a red bird"),
    ];
    let input = processor
        .encode_conversation(&messages, &[blank([1, 4, 6])])
        .unwrap();
    let text = |class| {
        let ids = input.input_ids.iter().zip(&input.classes);
        let ids: Vec<u32> = ids
            .filter(|(_, c)| **c == class)
            .map(|(id, _)| *id)
            .collect();
        processor.tokenizer.decode(&ids, false).unwrap()
    };
    assert_eq!(text(TokenClass::Prompt), "What is this?");
    assert_eq!(text(TokenClass::Answer), "a red bird<|im_end|>");
    assert_eq!(text(TokenClass::Vision), "<|image_pad|>".repeat(6));
    let special = text(TokenClass::Special);
    assert!(
        special.contains("You are a helpful assistant."),
        "{special}"
    );
    assert!(
        special.ends_with("<|im_start|>assistant\n\n"),
        "{special:?}"
    );
}

#[test]
fn raw_text_is_cut_without_a_template() {
    let processor = open_processor(&data("model")).unwrap();
    let text = "The quick brown fox, and then some more of it.";
    let ids = processor.encode_text(text).unwrap();
    let whole = processor.encode_pieces(text, "t", 512).unwrap();
    assert_eq!(whole.len(), 1);
    assert_eq!(whole[0].input_ids, ids);
    assert!(whole[0].classes.iter().all(|c| *c == TokenClass::Text));
    let pieces = processor.encode_pieces(text, "t", 4).unwrap();
    assert_eq!(pieces.len(), (ids.len() - 1).div_ceil(3));
    let again = pieces.iter().flat_map(|p| p.input_ids[1..].to_vec());
    assert_eq!(again.collect::<Vec<_>>(), ids[1..]);
    for pair in pieces.windows(2) {
        assert_eq!(pair[0].input_ids.last(), pair[1].input_ids.first());
    }
    let one = processor.encode_pieces("a", "t", 4).unwrap();
    assert_eq!((one.len(), one[0].input_ids.len()), (1, 1));
    for (text, max_tokens, expected) in [
        ("", 4, "one token"),
        ("see <|image_pad|>", 4, "image token"),
        ("a b", 1, "2 or more"),
    ] {
        let error = processor.encode_pieces(text, "file line 7", max_tokens);
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(
            max_tokens == 1 || message.contains("file line 7"),
            "{message}"
        );
    }
}

#[test]
fn pieces_begin_with_the_start_token_where_there_is_one() {
    let mut processor = open_processor(&data("model")).unwrap();
    let start = tokenizers::processors::template::TemplateProcessing::builder()
        .try_single("<|im_start|> $A")
        .unwrap()
        .special_tokens(vec![(
            "<|im_start|>",
            processor.tokenizer.token_to_id("<|im_start|>").unwrap(),
        )])
        .build()
        .unwrap();
    processor.tokenizer.with_post_processor(Some(start));
    let text = "The quick brown fox";
    let ids = processor.encode_text(text).unwrap();
    let pieces = processor.encode_pieces(text, "t", 3).unwrap();
    assert!(pieces.len() > 1);
    for piece in &pieces {
        assert_eq!(piece.input_ids[0], ids[0]);
        assert_eq!(piece.classes[0], TokenClass::Special);
        assert!(piece.classes[1..].iter().all(|c| *c == TokenClass::Text));
    }
    let again = pieces.iter().flat_map(|p| p.input_ids[1..].to_vec());
    assert_eq!(again.collect::<Vec<_>>(), ids[1..]);
}

#[test]
fn image_counts_that_disagree_are_refused() {
    let processor = open_with_template("qwen2_vl.jinja");
    let with_image = [Message {
        role: Role::User,
        content: vec![ContentPart::Image],
    }];
    assert!(processor.encode_prompt(&with_image, &[]).is_err());
    let smuggled = [Message::text(Role::User, "look: <|image_pad|>")];
    assert!(processor.encode_prompt(&smuggled, &[]).is_err());
    assert!(
        processor
            .encode_prompt(&with_image, &[blank([1, 2, 2])])
            .is_ok()
    );
}

#[test]
fn damaged_folders_name_their_file() {
    let copy = tempfile::tempdir().unwrap();
    let restore = || {
        for entry in std::fs::read_dir(data("model")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
    };
    let message = || open_processor(copy.path()).unwrap_err().to_string();
    restore();
    assert!(open_processor(copy.path()).is_ok());
    std::fs::write(copy.path().join("tokenizer.json"), b"{").unwrap();
    assert!(message().contains("tokenizer.json"));
    std::fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
    assert!(message().contains("tokenizer.json"));
    restore();
    std::fs::write(copy.path().join("preprocessor_config.json"), b"[]").unwrap();
    assert!(message().contains("preprocessor_config.json"));
    let other = br#"{"image_processor_type": "CLIPImageProcessor"}"#;
    std::fs::write(copy.path().join("preprocessor_config.json"), other).unwrap();
    assert!(message().contains("CLIPImageProcessor"));
}

#[derive(Deserialize)]
struct ImageCase {
    file: String,
    size: [usize; 2],
    crc32: u32,
    #[serde(default)]
    max_difference: Option<u8>,
}

#[test]
fn decoded_images_equal_pillow() {
    let golden = json("images.json");
    let cases: Vec<ImageCase> = serde_json::from_value(golden["lossless"].clone()).unwrap();
    assert!(cases.len() >= 30);
    let mut wrong = Vec::new();
    for case in cases {
        let bytes = std::fs::read(data("images").join(&case.file)).unwrap();
        let out = decode_image(&case.file, &bytes).unwrap();
        if [out.width, out.height] != case.size || image::crc32(&out.data) != case.crc32 {
            wrong.push(case.file);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn jpeg_and_webp_stay_within_the_measured_difference() {
    let golden = json("images.json");
    let cases: Vec<ImageCase> = serde_json::from_value(golden["lossy"].clone()).unwrap();
    assert!(cases.len() >= 4);
    let mut wrong = Vec::new();
    for case in cases {
        let bytes = std::fs::read(data("images").join(&case.file)).unwrap();
        let out = decode_image(&case.file, &bytes).unwrap();
        let expected = std::fs::read(data("images").join(format!("{}.png", case.file))).unwrap();
        let expected = decode_image("expected", &expected).unwrap();
        assert_eq!([out.width, out.height], case.size);
        let pairs = out.data.iter().zip(&expected.data);
        let difference = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        if difference > case.max_difference.unwrap() {
            wrong.push((case.file, difference));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn damaged_images_are_errors_that_name_the_image() {
    let folder = data("images");
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for cut in [0, 1, 7, 20, bytes.len() / 2] {
            if let Err(error) = decode_image("sample 3", &bytes[..cut]) {
                assert!(error.to_string().contains("sample 3"), "{error}");
            } else {
                let gif = path.extension().is_some_and(|e| e == "gif");
                assert!(gif, "{} cut at {cut} was accepted", path.display());
            }
        }
    }
    assert!(decode_image("x.png", b"<html>not found</html>").is_err());
}

#[test]
fn a_lying_image_size_is_refused_before_decoding() {
    let mut png = std::fs::read(data("images").join("rgb.png")).unwrap();
    png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    let header_crc = image::crc32(&png[12..29]);
    png[29..33].copy_from_slice(&header_crc.to_be_bytes());
    let message = decode_image("bomb.png", &png).unwrap_err().to_string();
    assert!(message.contains("60000x60000"), "{message}");
}

/// One pixel, of which a frame of 20 000 x 20 000 is a part.
#[test]
fn a_frame_larger_than_its_image_asks_for_no_memory() {
    let side = 20_000u16.to_le_bytes();
    let screen = [&b"GIF89a"[..], &[1, 0, 1, 0, 0x80, 0, 0], &[0; 6]].concat();
    let frame = [
        &[b',', 0, 0, 0, 0][..],
        &side,
        &side,
        &[0, 2, 2, 0x4C, 1, 0, b';'],
    ]
    .concat();
    let message = decode_image("small.gif", &[screen, frame].concat());
    let message = message.unwrap_err().to_string();
    assert!(message.contains("emory limit"), "{message}");
}

#[test]
fn a_tokenizer_that_breaks_off_is_an_error() {
    let whole = std::fs::read_to_string(data("model/tokenizer.json")).unwrap();
    let decoder = whole.find("\"decoder\"").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    for end in decoder..decoder + 40 {
        std::fs::write(&path, &whole[..end]).unwrap();
        let message = open_tokenizer(&path).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: JSON"), "{message}");
    }
}
