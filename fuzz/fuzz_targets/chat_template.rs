//! A chat template, and the messages' places in what it renders.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Map;
use vlmq::processor::chat::ChatTemplate;
use vlmq::processor::{ContentPart, Message, Role};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(template) = ChatTemplate::new("chat_template.jinja", text, Map::new()) else {
        return;
    };
    let messages = [
        Message::text(Role::System, " s\n"),
        Message {
            role: Role::User,
            content: vec![ContentPart::Image, ContentPart::Text("q?".into())],
        },
        Message::text(Role::Assistant, "a"),
    ];
    if let Ok(rendered) = template.render_spans(&messages, true) {
        for span in rendered.spans {
            assert!(rendered.text.get(span.bytes).is_some());
        }
    }
});
