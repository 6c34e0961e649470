package accesslog

import (
	"bytes"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func encoder() zapcore.Encoder { return zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()) }

// TestNobodyReadsTheLog has a pipe of which nobody reads: those who write lines go on all the same, what does not fit is
// counted, and a reader that comes at last gets whole lines, of which one says how many are missing.
func TestNobodyReadsTheLog(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l, stop := Open(w, zapcore.InfoLevel, encoder())
	record := Record{Direction: "outbound", Flag: "-", Policy: strings.Repeat("x", 1000)}
	const lines = 3 * bufferSize / 1000
	for range lines { // more than fits: who waited for the reader would wait for ever
		l.Write(&record)
	}
	dropped := l.Dropped()
	if dropped == 0 || dropped >= lines {
		t.Errorf("%d of %d lines dropped", dropped, lines)
	}
	var mu sync.Mutex
	var got bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		p := make([]byte, 64<<10)
		for {
			n, err := r.Read(p)
			mu.Lock()
			got.Write(p[:n])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		mu.Lock()
		told := bytes.Contains(got.Bytes(), []byte("lines dropped"))
		mu.Unlock()
		if told {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nobody was told of the lines that were dropped")
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	w.Close()
	<-read
	whole := int64(0)
	for line := range strings.Lines(got.String()) {
		if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "}\n") {
			t.Fatalf("a part of a line: %.100q", line)
		}
		if strings.Contains(line, "connection complete") {
			whole++
		}
	}
	if whole+dropped != lines {
		t.Errorf("%d lines came and %d were dropped, of %d", whole, dropped, lines)
	}
}

// TestStopWritesTheRest: what waits when the process ends is written; a log that nobody reads does not keep it.
func TestStopWritesTheRest(t *testing.T) {
	var out bytes.Buffer
	l, stop := Open(&out, zapcore.InfoLevel, encoder())
	for range 3 {
		l.Write(&Record{Flag: "-"})
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 3 {
		t.Errorf("%d lines of 3", n)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	l, stop = Open(w, zapcore.InfoLevel, encoder())
	for range 1000 {
		l.Write(&Record{Flag: "-", Policy: strings.Repeat("x", 1000)})
	}
	if err := stop(); err == nil {
		t.Error("no error although nobody has read")
	}
	r.Close() // which ends the writer
}

// disk is full until it is not.
type disk struct {
	mu      sync.Mutex
	full    bool
	written bytes.Buffer
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full {
		return 0, syscall.ENOSPC
	}
	return d.written.Write(p)
}

// TestFullDisk: lines that cannot be written are counted, and told of once others can.
func TestFullDisk(t *testing.T) {
	d := &disk{full: true}
	l, stop := Open(d, zapcore.InfoLevel, encoder())
	l.Write(&Record{Direction: "outbound", Flag: "-"})
	l.Write(&Record{Direction: "inbound", Flag: "-"})
	for end := time.Now().Add(20 * time.Second); l.Dropped() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of 2 lines counted", l.Dropped())
		}
	}
	d.mu.Lock()
	d.full = false
	d.mu.Unlock()
	l.Write(&Record{Direction: "outbound", Flag: "-"})
	told := func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return strings.Contains(d.written.String(), `"lines":2`)
	}
	for end := time.Now().Add(20 * time.Second); !told(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not told of 2 lines: %s", d.written.String())
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := l.Dropped(); n != 2 {
		t.Errorf("%d lines counted, want 2", n)
	}
}
