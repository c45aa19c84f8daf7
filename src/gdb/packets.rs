//! QEMU's own packets, `qqemu.*` and `Qqemu.*`, which the `gdbstub` crate does not know: they are answered here and taken
//! out of what it gets.

/// What the packets change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes {
    /// Memory is read and written by physical addresses.
    pub physical: bool,
    /// How single steps are done: 1 they are, 2 without interrupts, 4 without timers.
    pub step: u8,
    /// The bits of `step` that may be set.
    pub step_mask: u8,
}

/// Step at all.
pub const STEP: u8 = 1;
/// Without interrupts.
pub const NO_IRQ: u8 = 2;
/// Without timers: virtual time is a function of the instructions executed, so it stands still but for the one.
pub const NO_TIMER: u8 = 4;

impl Modes {
    /// As QEMU starts: without interrupts and timers, where the machine need not be repeatable.
    pub fn new(logged: bool) -> Modes {
        let step_mask = if logged { STEP } else { STEP | NO_IRQ | NO_TIMER };
        Modes { physical: false, step: step_mask, step_mask }
    }

    /// The answer to the packet with this body, if it is one of QEMU's.
    fn answer(&mut self, body: &str) -> Option<String> {
        let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok();
        let done = |ok: bool| if ok { "OK".to_owned() } else { "E22".to_owned() };
        Some(match body {
            "qqemu.sstepbits" => {
                let bits = [(STEP, "ENABLE"), (NO_IRQ, "NOIRQ"), (NO_TIMER, "NOTIMER")];
                let bits = bits.iter().filter(|(bit, _)| self.step_mask & bit != 0);
                bits.map(|(bit, name)| format!("{name}={bit}")).collect::<Vec<_>>().join(",")
            }
            "qqemu.sstep" => format!("{:#x}", self.step),
            "qqemu.PhyMemMode" => u8::from(self.physical).to_string(),
            "qqemu.Supported" => "sstepbits;sstep;PhyMemMode".into(),
            _ => {
                if let Some(value) = body.strip_prefix("Qqemu.sstep=").or(body.strip_prefix("Qqemu.sstep:")) {
                    let new = hex(value).and_then(|v| u8::try_from(v).ok());
                    let new = new.filter(|v| v & !self.step_mask == 0);
                    self.step = new.unwrap_or(self.step);
                    return Some(done(new.is_some()));
                }
                let value = hex(body.strip_prefix("Qqemu.PhyMemMode:")?);
                self.physical = value.map_or(self.physical, |v| v != 0);
                done(value.is_some())
            }
        })
    }
}

/// Where the bytes of a stream are.
#[derive(Debug, Default)]
enum Place {
    #[default]
    Between,
    Body,
    Checksum(u8),
}

/// Finds QEMU's packets in what GDB sends.
#[derive(Debug, Default)]
pub struct Filter {
    place: Place,
    body: Vec<u8>,
    no_acks: bool,
    /// GDB will acknowledge an answer that the stub did not send.
    acks: u32,
}

/// What became of a byte.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// The stub gets these.
    On(Vec<u8>),
    /// GDB gets these.
    Answered(Vec<u8>),
}

/// Longer ones are not QEMU's.
const LONGEST: usize = 64;

impl Filter {
    /// Take a byte from GDB.
    pub fn byte(&mut self, byte: u8, modes: &mut Modes) -> Passed {
        match self.place {
            Place::Between if byte == b'$' => {
                self.body.clear();
                self.body.push(byte);
                self.place = Place::Body;
            }
            Place::Between if byte == b'+' && self.acks > 0 => self.acks -= 1,
            Place::Between => return Passed::On(vec![byte]),
            Place::Body if byte == b'#' => {
                self.body.push(byte);
                self.place = Place::Checksum(2);
            }
            Place::Body => self.body.push(byte),
            Place::Checksum(left) => {
                self.body.push(byte);
                self.place = Place::Checksum(left - 1);
                if left == 1 {
                    self.place = Place::Between;
                    return self.packet(modes);
                }
            }
        }
        if self.body.len() > LONGEST && matches!(self.place, Place::Body) {
            // The rest of it goes by byte by byte; a '$' in it is escaped.
            self.place = Place::Between;
            return Passed::On(std::mem::take(&mut self.body));
        }
        Passed::On(Vec::new())
    }

    fn packet(&mut self, modes: &mut Modes) -> Passed {
        let packet = std::mem::take(&mut self.body);
        let body =
            packet.get(1..packet.len() - 3).and_then(|b| std::str::from_utf8(b).ok()).unwrap_or_default();
        self.no_acks |= body == "QStartNoAckMode";
        let Some(answer) = modes.answer(body) else { return Passed::On(packet) };
        let sum = answer.bytes().fold(0u8, u8::wrapping_add);
        let ack = if self.no_acks { "" } else { "+" };
        self.acks += u32::from(!self.no_acks);
        Passed::Answered(format!("{ack}${answer}#{sum:02x}").into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(filter: &mut Filter, modes: &mut Modes, text: &str) -> (String, String) {
        let (mut on, mut answered) = (Vec::new(), Vec::new());
        for byte in text.bytes() {
            match filter.byte(byte, modes) {
                Passed::On(bytes) => on.extend(bytes),
                Passed::Answered(bytes) => answered.extend(bytes),
            }
        }
        (String::from_utf8(on).unwrap(), String::from_utf8(answered).unwrap())
    }

    #[test]
    fn qemus_packets_are_answered_and_the_rest_passes() {
        let (mut f, mut m) = (Filter::default(), Modes::new(false));
        let (on, answered) = feed(&mut f, &mut m, "+$qSupported:a+#11$qqemu.sstepbits#00+$?#3f");
        assert_eq!(on, "+$qSupported:a+#11$?#3f");
        assert_eq!(answered, "+$ENABLE=1,NOIRQ=2,NOTIMER=4#f4");
        let (on, answered) = feed(&mut f, &mut m, "+$QStartNoAckMode#b0+$Qqemu.PhyMemMode:1#00\x03");
        assert_eq!((on.as_str(), answered.as_str()), ("+$QStartNoAckMode#b0+\x03", "$OK#9a"));
        assert!(m.physical);
        feed(&mut f, &mut m, "$Qqemu.sstep=0x5#00");
        assert_eq!(m.step, 5);
        assert_eq!(feed(&mut f, &mut m, "$Qqemu.sstep=9#00").1, "$E22#a9");
        assert_eq!(feed(&mut f, &mut m, "$qqemu.sstep#00").1, "$0x5#dd");
    }

    #[test]
    fn long_and_odd_streams_pass_unchanged() {
        let (mut f, mut m) = (Filter::default(), Modes::new(true));
        let text = format!("$X1000,40:{}#99$g#67\x03++", "a#b".repeat(60));
        assert_eq!(feed(&mut f, &mut m, &text), (text, String::new()));
        assert_eq!(m.step, STEP);
        assert_eq!(feed(&mut f, &mut m, "$Qqemu.sstep=3#00").1, "+$E22#a9");
    }
}
