package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Connection is one line of a ztunnel's access log: what the proxy itself says of a connection.
type Connection struct {
	Node      string `json:"-"`
	Direction string `json:"direction"`
	// Path is plain, hbone, waypoint, or node (two pods of one node, without a tunnel).
	Path                string `json:"path"`
	Source              string `json:"src.addr"`
	SourceIdentity      string `json:"src.identity"`
	SourceWorkload      string `json:"src.workload"`
	Destination         string `json:"dst.addr"`
	DestinationIdentity string `json:"dst.identity"`
	DestinationWorkload string `json:"dst.workload"`
	DestinationService  string `json:"dst.service"`
	HBONE               string `json:"dst.hbone_addr"`
	Sent                int64  `json:"bytes_sent"`
	Received            int64  `json:"bytes_recv"`
	Flags               string `json:"response_flags"`
	Policy              string `json:"policy"`
	Error               string `json:"error"`
}

// Position is a place in the ztunnels' logs.
type Position map[string]int64

// Position is where the ztunnels' logs end now.
func (w *World) Position() Position {
	p := Position{}
	for _, n := range w.Nodes {
		if info, err := os.Stat(w.logFile("ztunnel." + n.Name)); err == nil {
			p[n.Name] = info.Size()
		}
	}
	return p
}

func (w *World) logFile(name string) string { return filepath.Join(w.Dir, "log", name+".log") }

// Logs are the ends of all programs' logs, to explain a failure.
func (w *World) Logs() string {
	files, err := filepath.Glob(w.logFile("*"))
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, file := range files {
		if text := tail(file); text != "" {
			b.WriteString(text + "\n")
		}
	}
	return b.String()
}

// Connections are the access-log lines of all ztunnels since a position.
func (w *World) Connections(since Position) ([]Connection, error) {
	var all []Connection
	for _, n := range w.Nodes {
		err := eachLine(w.logFile("ztunnel."+n.Name), since[n.Name], func(line []byte) {
			c := Connection{Node: n.Name}
			if json.Unmarshal(line, &c) == nil && c.Direction != "" {
				all = append(all, c)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// WaitConnections waits until the logs since a position satisfy enough, because a proxy writes its lines when
// connections have closed, several at a time.
func (w *World) WaitConnections(ctx context.Context, since Position, enough func([]Connection) bool) ([]Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for {
		all, err := w.Connections(since)
		if err != nil || enough(all) {
			return all, err
		}
		select {
		case <-ctx.Done():
			return all, fmt.Errorf("the access logs do not tell: %w; they have %d lines, the last: %+v", ctx.Err(), len(all), all[max(0, len(all)-3):])
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// eachLine reads the whole lines of a file from an offset on; a file that is not there has none.
func eachLine(path string, offset int64, f func([]byte)) error {
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil || offset > int64(len(text)) {
		return err
	}
	text = text[offset:]
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	s := bufio.NewScanner(bytes.NewReader(text))
	for s.Buffer(nil, 1<<20); s.Scan(); {
		f(s.Bytes())
	}
	return s.Err()
}
