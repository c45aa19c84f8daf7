fn main() {
    println!("soak");
}
