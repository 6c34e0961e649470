package netns

import "os"

// SetHome gives b another way back, and returns the one it had.
func (b *Beginner) SetHome(f *os.File) (before *os.File) {
	before, b.home = b.home, f
	return before
}
