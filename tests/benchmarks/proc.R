# Rscript proc.R IN.csv OUT.csv: what pROC (Robin et al., BMC Bioinformatics 12:77, 2011) makes of paired scores.
# IN has the columns finding, positive (0 or 1), candidate, reference; OUT a row per finding. Its values for
# the tests' two data sets are kept in proc.json.
suppressMessages(library(pROC))
files <- commandArgs(trailingOnly = TRUE)
data <- read.csv(files[1])
rows <- lapply(unique(data$finding), function(finding) {
  one <- data[data$finding == finding, ]
  curve <- function(scores) roc(one$positive, scores, levels = c(0, 1), direction = "<", quiet = TRUE)
  candidate <- curve(one$candidate)
  reference <- curve(one$reference)
  test <- roc.test(candidate, reference, method = "delong", paired = TRUE)
  interval <- ci.auc(candidate, method = "delong")
  values <- c(interval[2], interval[1], interval[3], test$conf.int, test$statistic, test$p.value)
  c(finding, sprintf("%.17g", values))
})
table <- do.call(rbind, rows)
colnames(table) <- c("finding", "auroc", "low", "high", "difference_low", "difference_high", "z", "p")
write.csv(table, files[2], row.names = FALSE, quote = FALSE)
