package accesslog

import (
	"errors"
	"io"
	"sync"
	"time"
)

const (
	flushInterval = 100 * time.Millisecond // how long a line may wait for others to be written with it
	flushSize     = 64 << 10               // bytes that are written at once, without waiting
	bufferSize    = 4 << 20                // bytes beyond which lines are dropped
	stopPatience  = time.Second            // how long the last lines may take
)

// buffer writes lines in a goroutine of its own: who writes a line never waits for the reader of the log. A reader that
// does not keep up, or does not read at all, loses lines, and is told how many.
type buffer struct {
	out     io.Writer
	told    func(lost int64) // writes the line that says it
	written chan struct{}    // closed when the goroutine has ended
	wake    chan struct{}    // something to write
	full    chan struct{}    // much to write

	mu      sync.Mutex
	waiting []byte
	lost    int64 // lines, since the last that told of them
	dropped int64 // lines in all
	stopped bool
}

func newBuffer(out io.Writer) *buffer {
	return &buffer{out: out, written: make(chan struct{}), wake: make(chan struct{}, 1), full: make(chan struct{}, 1)}
}

// Write takes one line.
func (b *buffer) Write(line []byte) (int, error) {
	b.mu.Lock()
	before := len(b.waiting)
	if before+len(line) > bufferSize || b.stopped {
		b.lost++
		b.dropped++
		b.mu.Unlock()
		return len(line), nil
	}
	b.waiting = append(b.waiting, line...)
	b.mu.Unlock()
	if before == 0 {
		signal(b.wake)
	}
	if before < flushSize && before+len(line) >= flushSize {
		signal(b.full)
	}
	return len(line), nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Sync implements zapcore.WriteSyncer. A file of lines needs none: each call would make the kernel write to disk.
func (b *buffer) Sync() error { return nil }

// run writes until stop.
func (b *buffer) run() {
	defer close(b.written)
	var batch []byte
	for range b.wake {
		select { // others are written with it
		case <-b.full:
		case <-time.After(flushInterval):
		}
		b.mu.Lock()
		batch, b.waiting = b.waiting, batch[:0]
		lost, stopped := b.lost, b.stopped
		b.lost = 0
		b.mu.Unlock()
		if len(batch) > 0 {
			_, _ = b.out.Write(batch) // there is nobody to tell that nobody reads
		}
		if stopped { // nothing has come since
			return
		}
		if lost > 0 {
			b.told(lost)
		}
		if cap(batch) > 4*flushSize {
			batch = nil
		}
	}
}

// stop writes what waits, if that can be done soon.
func (b *buffer) stop() error {
	b.mu.Lock()
	b.stopped = true
	b.mu.Unlock()
	signal(b.wake)
	signal(b.full)
	select {
	case <-b.written:
		return nil
	case <-time.After(stopPatience):
		return errors.New("write the last lines of the access log: nobody reads it")
	}
}
