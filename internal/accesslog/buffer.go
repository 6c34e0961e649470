package accesslog

import (
	"bytes"
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
// does not keep up, does not read at all, or cannot be written to, loses lines, and is told how many.
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
		stopped := b.stopped
		b.mu.Unlock()
		lost := b.write(batch)
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

// write writes lines; lost is how many were lost before them, to be told now. What cannot be written, on a full disk or to a
// reader that has gone, is lost too, and told when something can be.
func (b *buffer) write(batch []byte) (lost int64) {
	n, err := 0, error(nil)
	if len(batch) > 0 {
		n, err = b.out.Write(batch)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		failed := int64(bytes.Count(batch[n:], []byte{'\n'}))
		b.lost += failed
		b.dropped += failed
		return 0
	}
	lost, b.lost = b.lost, 0
	return lost
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
