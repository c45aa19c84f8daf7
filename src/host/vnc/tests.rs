//! The server over a socket, with a console that keeps what it is told.

use super::*;

#[derive(Default)]
struct Fake {
    picture: Mutex<(u64, Picture)>,
    pointer: Mutex<Option<Pointer>>,
    seen: Mutex<Vec<String>>,
}

impl Console for Fake {
    fn look(&self, since: Option<u64>) -> Result<Option<View>, String> {
        let (number, picture) = self.picture.lock().unwrap().clone();
        let pointer = self.pointer.lock().unwrap().clone();
        Ok((since != Some(number)).then_some(View { number, picture, pointer, takes_size: true }))
    }
    fn resize(&self, width: u16, height: u16) -> bool {
        self.seen.lock().unwrap().push(format!("size {width}x{height}"));
        width > 0
    }
    fn key(&self, key: Key, down: bool) {
        self.seen.lock().unwrap().push(format!("key {} {down}", key.number));
    }
    fn pointer(&self, now: (u16, u16, u8), before: (u16, u16, u8), size: (u32, u32)) {
        self.seen.lock().unwrap().push(format!("pointer {now:?} {before:?} {size:?}"));
    }
    fn name(&self) -> String {
        "fake".into()
    }
}

impl Fake {
    fn show(&self, width: u32, height: u32, pixel: u32) {
        let mut shown = self.picture.lock().unwrap();
        let pixels = vec![pixel; (width * height) as usize];
        *shown = (shown.0 + 1, Picture { width, height, pixels });
    }
}

fn start(access: Access) -> (Arc<Vnc>, Arc<Fake>, TcpStream) {
    let (server, fake) = (Vnc::new(access), Arc::<Fake>::default());
    fake.show(8, 4, 0x11_2233);
    server.listen_tcp("127.0.0.1", 0..=0, Arc::clone(&fake) as _).unwrap();
    let stream = TcpStream::connect(("127.0.0.1", server.address().unwrap().1.unwrap())).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (server, fake, stream)
}

/// Say hello and choose this kind of authentication.
fn hello(stream: &mut TcpStream, kind: u8) {
    assert_eq!(&exactly::<12>(stream).unwrap(), b"RFB 003.008\n");
    stream.write_all(b"RFB 003.008\n").unwrap();
    assert_eq!(exactly::<2>(stream).unwrap(), [1, kind]);
    stream.write_all(&[kind]).unwrap();
}

/// Wait until the console was told of so many things.
fn told(fake: &Fake, n: usize) -> Vec<String> {
    for _ in 0..1000 {
        let seen = fake.seen.lock().unwrap().clone();
        if seen.len() >= n {
            return seen;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("only {:?}", fake.seen.lock().unwrap());
}

#[test]
fn a_client_sees_the_picture_and_its_changes_and_types() {
    let (server, fake, mut s) = start(Access::Everybody);
    hello(&mut s, 1);
    assert_eq!(exactly::<4>(&mut s).unwrap(), [0; 4]);
    s.write_all(&[1]).unwrap();
    let init = exactly::<28>(&mut s).unwrap();
    assert_eq!((&init[..4], &init[24..]), (&[0, 8, 0, 4][..], &b"fake"[..]));
    // Everything, raw.
    s.write_all(&[2, 0, 0, 1, 0xFF, 0xFF, 0xFF, 0x21]).unwrap();
    s.write_all(&[3, 0, 0, 0, 0, 0, 0, 8, 0, 4]).unwrap();
    assert_eq!(exactly::<16>(&mut s).unwrap(), [0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0, 4, 0, 0, 0, 0]);
    assert_eq!(exactly::<128>(&mut s).unwrap()[..5], [0x33, 0x22, 0x11, 0, 0x33]);
    assert_eq!(server.clients().len(), 1);
    // What changed, when it does; another size is told first.
    s.write_all(&[3, 1, 0, 0, 0, 0, 0, 8, 0, 4]).unwrap();
    fake.show(8, 4, 0x44_5566);
    assert_eq!(exactly::<16>(&mut s).unwrap()[..4], [0, 0, 0, 1]);
    assert_eq!(exactly::<128>(&mut s).unwrap()[124..], [0x66, 0x55, 0x44, 0]);
    fake.show(2, 2, 1);
    s.write_all(&[3, 1, 0, 0, 0, 0, 0, 8, 0, 4]).unwrap();
    assert_eq!(exactly::<16>(&mut s).unwrap(), [0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 2, 0xFF, 0xFF, 0xFF, 0x21]);
    s.write_all(&[3, 1, 0, 0, 0, 0, 0, 2, 0, 2]).unwrap();
    assert_eq!(exactly::<16>(&mut s).unwrap()[8..12], [0, 2, 0, 2]);
    assert_eq!(exactly::<16>(&mut s).unwrap()[12..], [1, 0, 0, 0]);
    // Text that was cut is passed over; keys and the pointer arrive; a key held is let go at the end.
    s.write_all(&[6, 0, 0, 0, 0, 0, 0, 3, b'a', b'b', b'c']).unwrap();
    s.write_all(&[5, 1, 0, 1, 0, 1, 4, 1, 0, 0, 0, 0, 0, 0x41]).unwrap();
    let seen = told(&fake, 2);
    assert_eq!(seen, ["pointer (1, 1, 1) (0, 0, 0) (2, 2)", "key 30 true"]);
    drop(s);
    assert_eq!(told(&fake, 3)[2], "key 30 false");
}

#[test]
fn a_client_draws_the_pointer_and_asks_for_another_size() {
    let (_server, fake, mut s) = start(Access::Everybody);
    hello(&mut s, 1);
    exactly::<4>(&mut s).unwrap();
    s.write_all(&[1]).unwrap();
    exactly::<28>(&mut s).unwrap();
    // Cursor and ExtendedDesktopSize: the size is said at once, with its one screen.
    s.write_all(&[2, 0, 0, 2, 0xFF, 0xFF, 0xFF, 0x11, 0xFF, 0xFF, 0xFE, 0xCC]).unwrap();
    let said = exactly::<36>(&mut s).unwrap();
    assert_eq!(said[..20], [0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0, 4, 0xFF, 0xFF, 0xFE, 0xCC, 1, 0, 0, 0]);
    assert_eq!(said[28..32], [0, 8, 0, 4]);
    // With the first picture comes the pointer.
    *fake.pointer.lock().unwrap() = Some(Pointer { width: 1, height: 1, hot: (0, 0), pixels: vec![!0] });
    s.write_all(&[3, 0, 0, 0, 0, 0, 0, 8, 0, 4]).unwrap();
    let said = exactly::<21>(&mut s).unwrap();
    assert_eq!(said[..4], [0, 0, 0, 2]);
    assert_eq!(said[8..], [0, 1, 0, 1, 0xFF, 0xFF, 0xFF, 0x11, 0xFF, 0xFF, 0xFF, 0, 0x80]);
    exactly::<140>(&mut s).unwrap();
    // The wish for a size is passed on, and answered.
    let mut wish = vec![251, 0, 0, 16, 0, 12, 1, 0];
    wish.extend([0; 16]);
    s.write_all(&wish).unwrap();
    assert_eq!(exactly::<36>(&mut s).unwrap()[4..8], [0, 1, 0, 4]);
    assert_eq!(told(&fake, 1), ["size 16x12"]);
    s.write_all(&[3, 1, 0, 0, 0, 0, 0, 8, 0, 4]).unwrap();
    fake.show(16, 12, 7);
    assert_eq!(exactly::<36>(&mut s).unwrap()[4..12], [0, 0, 0, 0, 0, 16, 0, 12]);
}

#[test]
fn only_the_right_password_opens() {
    let (server, _, mut s) = start(Access::Password(None));
    let answer = |s: &mut TcpStream, password: &str| {
        hello(s, 2);
        let challenge = exactly::<16>(s).unwrap();
        s.write_all(&encrypt(password, challenge)).unwrap();
        exactly::<4>(s).unwrap()[3]
    };
    assert_eq!(answer(&mut s, ""), 1);
    assert!(server.set_password(Some("tell".into())));
    let again = || {
        let stream = TcpStream::connect(("127.0.0.1", server.address().unwrap().1.unwrap())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    };
    assert_eq!(answer(&mut again(), "told"), 1);
    assert_eq!(answer(&mut again(), "tell"), 0);
    assert!(!Vnc::new(Access::Everybody).set_password(None));
}

#[test]
fn nonsense_ends_only_its_own_connection() {
    let (server, _, mut s) = start(Access::Everybody);
    s.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut rest = Vec::new();
    let _ = s.read_to_end(&mut rest);
    let mut s = TcpStream::connect(("127.0.0.1", server.address().unwrap().1.unwrap())).unwrap();
    hello(&mut s, 1);
}

#[test]
fn the_answer_to_a_challenge_is_des_with_reversed_bits() {
    // DES of eight zero bytes with an all-zero key (FIPS 46's known answer).
    assert_eq!(encrypt("", [0; 16])[..8], [0x8C, 0xA6, 0x4D, 0xE9, 0xC1, 0xB1, 0x23, 0xA7]);
    // Bits reversed, "\x01" is DES' key 0x80...: the known answer of the variable-key test.
    assert_eq!(encrypt("\x01", [0; 16])[..8], [0x95, 0xA8, 0xD7, 0x28, 0x13, 0xDA, 0xA9, 0x4D]);
}
