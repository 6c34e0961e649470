// Package accesslog (plumbing) writes one line per connection, when it is over. The keys are those of Istio's node
// proxy; docs/observability.md lists what a line may say.
package accesslog

import (
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Peer is one end of a connection.
type Peer struct {
	Addr      netip.AddrPort
	Workload  string
	Namespace string
	// Identity is the peer's SPIFFE ID; empty where it was not authenticated.
	Identity string
}

// Record is a connection that is over, or was never made.
type Record struct {
	Source      Peer
	Destination Peer
	// HBONEAddr is the address behind the tunnel, where there is one; Destination.Addr is then the next proxy's.
	HBONEAddr string
	Service   string
	// Direction is "outbound" or "inbound", as the proxy that writes the line sees it.
	Direction string
	// Path is how the bytes went: "hbone", "waypoint" (HBONE to a waypoint), "node" (within this node) or "plain".
	Path string
	// Received are the application bytes that came from the source, Sent those that went back to it.
	Sent, Received int64
	Duration       time.Duration
	// Flag is the reason in short, as metrics have it (response_flags); "-" when all went well.
	Flag string
	// Policy is the authorization policy that decided, if one did.
	Policy string
	// DryRun are the dry-run policies that would have decided, as "<action> <namespace>/<name>".
	DryRun []string
	// Err says what went wrong; empty when nothing did.
	Err string
}

// Log writes records.
type Log struct {
	log    *zap.Logger
	buffer *buffer // nil: log's own
}

// New writes to log.
func New(log *zap.Logger) *Log { return &Log{log: log} }

// Open is a log for a process with many connections: Write never waits for who reads out, and lines that do not fit into
// a buffer of 4 MiB are dropped and counted. Stop writes what is still waiting, for up to a second.
func Open(out io.Writer, level zapcore.LevelEnabler, encoder zapcore.Encoder) (l *Log, stop func() error) {
	b := newBuffer(out)
	l = &Log{log: zap.New(zapcore.NewCore(encoder, b, level)).Named("access"), buffer: b}
	b.told = func(lost int64) { l.log.Warn("access log lines dropped", zap.Int64("lines", lost)) }
	go b.run()
	return l, b.stop
}

// Dropped is how many lines were dropped, as nobody read those before them.
func (l *Log) Dropped() int64 {
	if l.buffer == nil {
		return 0
	}
	l.buffer.mu.Lock()
	defer l.buffer.mu.Unlock()
	return l.buffer.dropped
}

// Write writes one line: at level info, or error when the connection failed.
func (l *Log) Write(r *Record) {
	level, message := zapcore.InfoLevel, "connection complete"
	if r.Err != "" {
		level, message = zapcore.ErrorLevel, "connection failed"
	}
	entry := l.log.Check(level, message)
	if entry == nil {
		return
	}
	f := fields{list: make([]zap.Field, 0, 20)}
	f.addr("src.addr", r.Source.Addr)
	f.text("src.workload", r.Source.Workload)
	f.text("src.namespace", r.Source.Namespace)
	f.text("src.identity", r.Source.Identity)
	f.addr("dst.addr", r.Destination.Addr)
	f.text("dst.hbone_addr", r.HBONEAddr)
	f.text("dst.service", r.Service)
	f.text("dst.workload", r.Destination.Workload)
	f.text("dst.namespace", r.Destination.Namespace)
	f.text("dst.identity", r.Destination.Identity)
	f.text("direction", r.Direction)
	f.text("path", r.Path)
	f.list = append(f.list,
		zap.Int64("bytes_sent", r.Sent),
		zap.Int64("bytes_recv", r.Received),
		zap.String("duration", milliseconds(r.Duration)))
	f.text("response_flags", r.Flag)
	f.text("policy", r.Policy)
	f.text("dry_run", strings.Join(r.DryRun, ", "))
	f.text("error", r.Err)
	entry.Write(f.list...)
}

// fields collects what is known; what is not is left out.
type fields struct{ list []zap.Field }

func (f *fields) text(key, value string) {
	if value != "" {
		f.list = append(f.list, zap.String(key, value))
	}
}

func (f *fields) addr(key string, value netip.AddrPort) {
	if value.IsValid() {
		f.list = append(f.list, zap.String(key, value.String()))
	}
}

// milliseconds writes a duration as "12ms", as Istio's node proxy does; parts of a millisecond are cut off.
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(d.Milliseconds(), 10) + "ms"
}
