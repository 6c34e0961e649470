package agent

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
)

// apiServer answers requests from a table of "METHOD path" to body, and keeps what it was asked.
type apiServer struct {
	answers map[string]string

	mu    sync.Mutex
	asked []string
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	line := r.Method + " " + r.URL.Path
	s.mu.Lock()
	s.asked = append(s.asked, strings.TrimSpace(line+" "+r.URL.Query().Get("fieldSelector")+" "+string(body)))
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	answer, ok := s.answers[line]
	switch {
	case r.URL.Query().Get("sendInitialEvents") != "":
		// As an API server that cannot list by watching: clients list then.
		w.WriteHeader(http.StatusUnprocessableEntity)
		answer = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`
	case r.URL.Query().Get("watch") != "":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	case !ok:
		w.WriteHeader(http.StatusNotFound)
		answer = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`
	}
	io.WriteString(w, answer)
}

func newTestAPI(t *testing.T, answers map[string]string) (*api, *apiServer) {
	t.Helper()
	s := &apiServer{answers: answers}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	kubeconfig := filepath.Join(t.TempDir(), "config")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"` + server.URL + `"}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := newAPI(kubeconfig, "node1")
	if err != nil {
		t.Fatal(err)
	}
	return a, s
}

func TestAPIRequests(t *testing.T) {
	const podBody = `{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web","namespace":"app","uid":"u-1"},"spec":{"nodeName":"node1"}}`
	a, s := newTestAPI(t, map[string]string{
		"GET /api/v1/namespaces/app/pods/web":                                podBody,
		"GET /api/v1/namespaces/app":                                         `{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"app"}}`,
		"PATCH /api/v1/namespaces/app/pods/web/status":                       podBody,
		"GET /apis/apps/v1/namespaces/istio-system/daemonsets/there":         `{"metadata":{"name":"there"}}`,
		"GET /apis/apps/v1/namespaces/istio-system/daemonsets/being-deleted": `{"metadata":{"deletionTimestamp":"2026-01-01T00:00:00Z"}}`,
		"GET /apis/apps/v1/namespaces/istio-system/daemonsets/withdrawn":     `{"metadata":{"annotations":{"fairlead-mesh.io/withdraw":"true"}}}`,
	})
	ctx := t.Context()
	pod, err := a.pod(ctx, "app", "web")
	if err != nil || pod.Name != "web" || pod.Spec.NodeName != "node1" {
		t.Fatalf("pod %+v, %v", pod, err)
	}
	if _, err := a.pod(ctx, "app", "other"); !apierrors.IsNotFound(err) {
		t.Errorf("a pod that is not there: %v", err)
	}
	if namespace, err := a.namespace(ctx, "app"); err != nil || namespace.Name != "app" {
		t.Errorf("namespace %+v, %v", namespace, err)
	}
	for _, on := range []bool{true, false} {
		if err := a.annotate(ctx, pod, on); err != nil {
			t.Errorf("annotate: %v", err)
		}
	}
	gone := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "gone", Namespace: "app"}}
	if err := a.annotate(ctx, gone, true); err != nil {
		t.Errorf("annotate a pod that is gone: %v", err)
	}
	for name, want := range map[string]bool{"there": false, "being-deleted": false, "deleted": false, "withdrawn": true} {
		if got, err := a.withdrawn(ctx, "istio-system", name); err != nil || got != want {
			t.Errorf("DaemonSet %s withdrawn: %v, %v", name, got, err)
		}
	}
	var patches []string
	for _, line := range s.asked {
		if rest, ok := strings.CutPrefix(line, "PATCH /api/v1/namespaces/app/pods/web/status"); ok {
			patches = append(patches, strings.TrimSpace(rest))
		}
	}
	want := []string{
		`{"metadata":{"annotations":{"ambient.istio.io/redirection":"enabled"},"uid":"u-1"}}`,
		`{"metadata":{"annotations":{"ambient.istio.io/redirection":null},"uid":"u-1"}}`,
	}
	if diff := cmp.Diff(want, patches); diff != "" {
		t.Errorf("patches (-want +got):\n%s", diff)
	}
}

func TestAPIWarns(t *testing.T) {
	a, s := newTestAPI(t, map[string]string{"POST /api/v1/namespaces/app/events": `{"kind":"Event","apiVersion":"v1"}`})
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "app", UID: "u-1"}}
	if err := a.warn(t.Context(), pod, "FailedCapture", "no proxy"); err != nil {
		t.Fatal(err)
	}
	if len(s.asked) != 1 || !strings.Contains(s.asked[0], "FailedCapture") || !strings.Contains(s.asked[0], "no proxy") || !strings.Contains(s.asked[0], "u-1") {
		t.Errorf("asked %q", s.asked)
	}
}

func TestAPIFeedsTheCaches(t *testing.T) {
	list := func(kind string, items ...any) string {
		text, err := json.Marshal(map[string]any{"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": "5"}, "items": items})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	a, s := newTestAPI(t, map[string]string{
		"GET /api/v1/pods": list("PodList", map[string]any{"metadata": map[string]any{"name": "web", "namespace": "app", "uid": "u-1",
			"labels": map[string]any{modeLabel: "ambient", "app": "web"}}, "spec": map[string]any{"nodeName": "node1"}}),
		"GET /api/v1/namespaces": list("NamespaceList", map[string]any{"metadata": map[string]any{"name": "app"}}),
	})
	for _, tc := range []struct {
		lists cache.ListerWatcher
		kind  runtime.Object
		key   string
	}{{a.podLists(), &corev1.Pod{}, "app/web"}, {a.namespaceLists(), &corev1.Namespace{}, "app"}} {
		store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
			ListerWatcher: tc.lists, ObjectType: tc.kind, Handler: cache.ResourceEventHandlerFuncs{}, Transform: trim,
		})
		go informer.RunWithContext(t.Context())
		for end := time.Now().Add(5 * time.Second); !informer.HasSynced() && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		got, ok, err := store.GetByKey(tc.key)
		if err != nil || !ok {
			t.Errorf("%s is not in the cache: %v", tc.key, err)
			continue
		}
		if pod, isPod := got.(*corev1.Pod); isPod && cmp.Diff(map[string]string{modeLabel: "ambient"}, pod.Labels) != "" {
			t.Errorf("labels kept: %v", pod.Labels)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if want := "GET /api/v1/pods spec.nodeName=node1"; !strings.Contains(strings.Join(s.asked, "\n"), want) {
		t.Errorf("asked %q, want %q among it", s.asked, want)
	}
}
