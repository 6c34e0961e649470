package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// record is what the agent knows of one pod's sandbox. It is on disk too, where the next agent finds it.
type record struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	ContainerID    string `json:",omitempty"`
	// Netns is where the pod's network namespace was last seen, and Cookie its identity.
	Netns  string
	Cookie uint64
	IPs    []netip.Addr
	// Redirected tells whether the pod is captured; Routed whether its namespace still has our routes.
	Redirected bool
	Routed     bool
	// Exclude is what the pod leaves out of redirection.
	Exclude mesh.Exclusions `json:",omitzero"`
}

func (r record) pod() string { return r.Namespace + "/" + r.Name }

// validUID is what a pod's UID may look like, here a file name.
var validUID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,63}$`)

// records is a set of records, each a file of a directory. Its methods are safe for concurrent use.
type records struct {
	dir string

	mu    sync.Mutex
	byUID map[string]record
}

// openRecords reads the directory. A file that cannot be understood is removed, and named in skipped: the pod is found
// again without it.
func openRecords(dir string) (r *records, skipped []string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make the directory of pod records: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read pod records: %w", err)
	}
	r = &records{dir: dir, byUID: map[string]record{}}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("read pod record: %w", err)
		}
		var rec record
		if json.Unmarshal(content, &rec) != nil || r.path(rec.UID) != path {
			skipped = append(skipped, path)
			if err := os.Remove(path); err != nil {
				return nil, nil, fmt.Errorf("remove a broken pod record: %w", err)
			}
			continue
		}
		r.byUID[rec.UID] = rec
	}
	return r, skipped, nil
}

func (r *records) path(uid string) string { return filepath.Join(r.dir, uid+".json") }

func (r *records) get(uid string) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok := r.byUID[uid]
	return rec, ok
}

// byCookie finds the captured pod whose network namespace has that cookie.
func (r *records) byCookie(cookie uint64) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.byUID {
		if rec.Cookie == cookie && rec.Redirected {
			return rec, true
		}
	}
	return record{}, false
}

// all returns a copy of the set.
func (r *records) all() []record {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []record
	for _, rec := range r.byUID {
		all = append(all, rec)
	}
	return all
}

// put adds or replaces a record; the file is whole or not there, also after a crash. Of one pod's records, one is put or
// removed at a time.
func (r *records) put(rec record) error {
	if !validUID.MatchString(rec.UID) {
		return fmt.Errorf("record a pod: its UID %q is not one", rec.UID)
	}
	content, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode pod record: %w", err)
	}
	temporary := r.path(rec.UID) + ".new"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return fmt.Errorf("write pod record: %w", err)
	}
	if err := os.Rename(temporary, r.path(rec.UID)); err != nil {
		return fmt.Errorf("write pod record: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byUID[rec.UID] = rec
	return nil
}

func (r *records) remove(uid string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.byUID[uid]; !ok {
		return nil
	}
	delete(r.byUID, uid)
	if err := os.Remove(r.path(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pod record: %w", err)
	}
	return nil
}
